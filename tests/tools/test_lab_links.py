"""The machine that says when packets arrive: rates, delays, queues, loss, outages, and bounds."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from lab import links
from lab.links import Drop, Network, Packet, Trains
from lab.settings import HostSettings, Outage

MBIT = 1e6
FAST = HostSettings()


def packet(
    content: int = 0, *, source: str = "a", destination: str = "b", size: int = 1250, segment: int | None = None
):
    return Packet(
        source=source, destination=destination, num_bytes=size, segment_bytes=segment or size, content=content
    )


def landing(network: Network[int]) -> list[tuple[float, int]]:
    """When each packet arrives, with its content; asks only when the machine wants to be asked."""
    found = []
    while (time_s := network.next_s) is not None:
        found += [(time_s, each.content) for each in network.arrivals(time_s)]
    return found


def test_a_packet_takes_both_delays_and_its_time_at_both_rates() -> None:
    hosts = {
        "a": HostSettings(delay_s=0.010, up_bits_per_s=10 * MBIT, down_bits_per_s=1 * MBIT),
        "b": HostSettings(delay_s=0.020, up_bits_per_s=1 * MBIT, down_bits_per_s=5 * MBIT),
    }
    network: Network[int] = Network(hosts)
    assert network.send(100.0, packet()) is None
    # 10,000 bits: 1 ms up at 10 Mbit/s, 2 ms down at 5 Mbit/s.
    assert landing(network) == [(pytest.approx(100.033), 0)]


def test_packets_are_served_one_after_the_other_at_the_rate() -> None:
    network: Network[int] = Network({"a": HostSettings(up_bits_per_s=10 * MBIT), "b": FAST})
    for number in range(5):
        network.send(0.0, packet(number))
    assert landing(network) == [(pytest.approx(0.001 * (number + 1)), number) for number in range(5)]


def test_who_shares_a_way_down_shares_its_rate() -> None:
    network: Network[int] = Network({"a": FAST, "b": HostSettings(down_bits_per_s=10 * MBIT), "c": FAST})
    for number in range(4):
        network.send(0.0, packet(number, source="ac"[number % 2]))
    assert [time_s for time_s, _ in landing(network)] == pytest.approx([0.001, 0.002, 0.003, 0.004])


def test_directions_and_pairs_do_not_disturb_each_other() -> None:
    network: Network[int] = Network(
        dict.fromkeys("abcd", HostSettings(up_bits_per_s=10 * MBIT, down_bits_per_s=10 * MBIT))
    )
    network.send(0.0, packet(0))
    network.send(0.0, packet(1, source="b", destination="a"))
    network.send(0.0, packet(2, source="c", destination="d"))
    assert [time_s for time_s, _ in landing(network)] == pytest.approx([0.002] * 3)


def test_a_train_of_segments_takes_no_longer_than_its_segments_would() -> None:
    hosts = {"a": HostSettings(delay_s=0.05, up_bits_per_s=10 * MBIT), "b": HostSettings(down_bits_per_s=10 * MBIT)}
    train: Network[int] = Network(hosts)
    train.send(0.0, packet(size=12_500, segment=1250))
    single: Network[int] = Network(hosts)
    for number in range(10):
        single.send(0.0, packet(number))
    assert landing(train)[-1][0] == pytest.approx(landing(single)[-1][0])


def test_a_train_is_what_a_path_takes_five_milliseconds_for_and_no_more_than_a_quarter_of_its_queue() -> None:
    hosts = {
        "slow": HostSettings(up_bits_per_s=4 * MBIT, down_bits_per_s=20 * MBIT),
        "fast": HostSettings(up_bits_per_s=100 * MBIT, down_bits_per_s=1_000 * MBIT),
        "free": FAST,
        "least": HostSettings(up_bits_per_s=0.1 * MBIT),
    }
    assert Trains.of("slow", hosts) == Trains(usual_segments=2, max_bytes=3_000, are_long=True)
    assert Trains.of("fast", hosts) == Trains(usual_segments=8, max_bytes=62_500)
    assert Trains.of("free", hosts) == Trains(usual_segments=8, max_bytes=65_000)
    assert Trains.of("least", hosts) == Trains(usual_segments=2, max_bytes=3_000, are_long=True)
    hosts["fast"] = HostSettings(up_bits_per_s=100 * MBIT, queue_bytes=40_000)
    assert Trains.of("fast", hosts) == Trains(usual_segments=6, max_bytes=10_000, are_long=True)
    assert Trains.of("a", {"a": FAST, "b": HostSettings(up_bits_per_s=MBIT)}) == Trains(), "b's way up is not a's"


@given(st.none() | st.floats(1e4, 1e10), st.none() | st.floats(1e4, 1e10))
def test_a_usual_train_is_one_that_is_allowed(up: float | None, down: float | None) -> None:
    trains = Trains.of("a", {"a": HostSettings(up_bits_per_s=up), "b": HostSettings(down_bits_per_s=down)})
    assert trains.usual_segments >= 2
    assert trains.usual_segments * 1500 <= trains.max_bytes <= 65_000


def test_nothing_wakes_the_router_for_a_packet_in_the_middle() -> None:
    network: Network[int] = Network({"a": HostSettings(delay_s=0.010), "b": HostSettings(delay_s=0.020)})
    network.send(0.0, packet())
    assert network.next_s == pytest.approx(0.020)
    assert network.arrivals(0.020) == []
    assert network.next_s == pytest.approx(0.030)


def test_a_change_finds_packets_where_they_are_though_nobody_woke_for_them() -> None:
    network: Network[int] = Network({"a": HostSettings(delay_s=0.1), "b": HostSettings(delay_s=0.2)})
    network.send(0.0, packet(0))
    network.send(0.1, packet(1))
    network.change(0.15, "b", HostSettings(delay_s=0.25))
    # The first was on its way down already.
    assert landing(network) == [(pytest.approx(0.3), 0), (pytest.approx(0.45), 1)]
    network.send(1.0, packet(2))
    network.change(1.05, "b", FAST)
    assert landing(network) == [(pytest.approx(1.1), 2)]


def test_a_full_queue_drops_what_comes_and_takes_more_when_it_has_room() -> None:
    network: Network[int] = Network({"a": HostSettings(up_bits_per_s=10 * MBIT, queue_bytes=3 * 1250), "b": FAST})
    assert [network.send(0.0, packet(number)) for number in range(5)] == [None, None, None, Drop.QUEUE, Drop.QUEUE]
    assert network.send(0.001, packet(9)) is None
    assert [content for _, content in landing(network)] == [0, 1, 2, 9]
    assert network.counters["a"].dropped[Drop.QUEUE] == 2


def test_a_full_queue_on_the_way_down_is_counted_at_the_receiver() -> None:
    network: Network[int] = Network({"a": FAST, "b": HostSettings(down_bits_per_s=10 * MBIT, queue_bytes=2 * 1250)})
    for number in range(5):
        network.send(0.0, packet(number))
    assert [content for _, content in landing(network)] == [0, 1]
    assert network.counters["b"].dropped[Drop.QUEUE] == 3


def test_a_packet_larger_than_the_queue_passes_if_nothing_waits() -> None:
    network: Network[int] = Network({"a": HostSettings(up_bits_per_s=10 * MBIT, queue_bytes=100), "b": FAST})
    assert network.send(0.0, packet()) is None


def test_what_is_held_is_bounded() -> None:
    network: Network[int] = Network({"a": HostSettings(delay_s=1.0), "b": FAST})
    size = links.MAX_HELD_BYTES // 4
    assert [network.send(0.0, packet(size=size)) for _ in range(5)] == [None] * 4 + [Drop.MEMORY]
    assert len(network.arrivals(1.0)) == 4
    assert network.send(1.0, packet(size=size)) is None, "what has arrived is held no more"


def test_loss_is_the_share_that_was_asked_and_the_same_for_the_same_seed() -> None:
    def lost(seed: int) -> list[int]:
        network: Network[int] = Network({"a": HostSettings(loss=0.1), "b": FAST}, seed=seed)
        return [number for number in range(5_000) if network.send(0.0, packet(number)) is Drop.LOSS]

    assert lost(1) == lost(1) != lost(2)
    assert 400 < len(lost(1)) < 600


def test_loss_of_both_hosts_adds_up() -> None:
    network: Network[int] = Network({"a": HostSettings(loss=0.5), "b": HostSettings(loss=0.5)})
    for number in range(4_000):
        network.send(0.0, packet(number))
    assert 900 < len(network.arrivals(0.0)) < 1_100
    assert network.counters["a"].dropped[Drop.LOSS] > 1_800
    assert network.counters["b"].dropped[Drop.LOSS] > 900


def test_an_outage_drops_what_is_sent_and_what_would_land_and_nothing_else() -> None:
    outage = (Outage(start_s=1.0, duration_s=0.5),)
    network: Network[int] = Network({"a": HostSettings(delay_s=0.1), "b": HostSettings(outages=outage)}, start_s=10.0)
    found = []
    for number, time_s in enumerate((10.85, 10.95, 11.35, 11.45)):
        found += network.arrivals(time_s)
        assert network.send(time_s, packet(number)) is None
    found += network.arrivals(12.0)
    assert [each.content for each in found] == [0, 3]
    assert network.counters["b"].dropped[Drop.OUTAGE] == 2

    back: Network[int] = Network({"a": HostSettings(), "b": HostSettings(outages=outage)})
    assert back.send(1.2, packet(source="b", destination="a")) is Drop.OUTAGE
    assert back.send(1.5, packet(source="b", destination="a")) is None


def test_a_change_takes_effect_at_once_and_lets_nothing_overtake() -> None:
    network: Network[int] = Network({"a": HostSettings(delay_s=0.2), "b": FAST})
    network.send(0.0, packet(0))
    network.change(0.1, "a", HostSettings(delay_s=0.01))
    network.send(0.1, packet(1))
    network.send(0.3, packet(2))
    assert landing(network) == [(pytest.approx(0.2), 0), (pytest.approx(0.2), 1), (pytest.approx(0.31), 2)]


def test_what_waits_goes_on_at_the_new_rate() -> None:
    network: Network[int] = Network({"a": HostSettings(up_bits_per_s=1 * MBIT), "b": FAST})
    network.send(0.0, packet(0))  # takes 10 ms
    network.change(0.005, "a", HostSettings(up_bits_per_s=10 * MBIT))
    network.send(0.005, packet(1))
    # Half of the first is left: 0.5 ms at the new rate; then 1 ms. The first keeps the time that it was given.
    assert [content for _, content in landing(network)] == [0, 1]
    network.change(0.02, "a", FAST)
    network.send(0.02, packet(2))
    assert landing(network) == [(pytest.approx(0.02), 2)]


HOSTS = st.builds(
    HostSettings,
    delay_s=st.floats(0, 1),
    up_bits_per_s=st.none() | st.floats(1e4, 1e9),
    down_bits_per_s=st.none() | st.floats(1e4, 1e9),
    loss=st.sampled_from([0.0, 0.3]),
    queue_bytes=st.none() | st.integers(0, 100_000),
)
SENDING = st.lists(
    st.tuples(st.floats(0, 0.1), st.sampled_from(["ab", "ac", "ba", "bc", "ca", "cb"]), st.integers(40, 65_000)),
    max_size=60,
)


@given(st.fixed_dictionaries({"a": HOSTS, "b": HOSTS, "c": HOSTS}), SENDING)
def test_packets_are_conserved_keep_their_order_and_are_never_early(
    hosts: dict[str, HostSettings], sending: list[tuple[float, str, int]]
) -> None:
    network: Network[int] = Network(hosts)
    now_s, sent, found = 0.0, {}, []
    for number, (pause_s, pair, size) in enumerate(sending):
        now_s += pause_s
        found += [(now_s, each) for each in network.arrivals(now_s)]
        if (
            network.send(now_s, packet(number, source=pair[0], destination=pair[1], size=size, segment=min(size, 1500)))
            is None
        ):
            sent[number] = now_s
    while (time_s := network.next_s) is not None:
        found += [(time_s, each) for each in network.arrivals(time_s)]
    lost_later = sum(network.counters[name].sent_packets - network.counters[name].received_packets for name in hosts)
    assert len(found) == len(sent) - lost_later
    assert all(each.content in sent for _, each in found)
    for time_s, each in found:
        up, down = hosts[each.source], hosts[each.destination]
        least_s = up.delay_s + down.delay_s
        slowest = min((rate for rate in (up.up_bits_per_s, down.down_bits_per_s) if rate), default=None)
        if slowest is not None:
            least_s += each.num_bytes * 8 / slowest
        assert time_s >= sent[each.content] + least_s - 1e-9
    for pair in {(each.source, each.destination) for _, each in found}:
        numbers = [each.content for _, each in found if (each.source, each.destination) == pair]
        assert all(first < second for first, second in pairwise(numbers))
