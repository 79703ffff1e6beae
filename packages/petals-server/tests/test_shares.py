"""The rules of turns: shares of peers, and of inference and training, whatever anybody does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from petals_server.scheduling.request import Urgency
from petals_server.scheduling.shares import Shares, VirtualTimes


@dataclass(slots=True, kw_only=True, eq=False)
class Wanted:
    """Work that waits."""

    peer_id: str | int | None
    num_tokens_left: int = 1
    arrived_s: float = 0.0
    urgency: Urgency = Urgency.DECODE


def serve(shares: Shares, wanted: list[Wanted], now_s: float, budget: int) -> dict[str | int | None, int]:
    """One turn of at most ``budget`` tokens; returns the tokens of each peer, and removes what is done."""
    served: Counter[str | int | None] = Counter()
    for request in shares.order(wanted, now_s):
        count = min(budget, request.num_tokens_left)
        if count:
            shares.charge(request, count)
            served[request.peer_id] += count
            request.num_tokens_left -= count
            budget -= count
            if not request.num_tokens_left:
                wanted.remove(request)
    return served


def test_a_hundred_sessions_of_one_peer_get_what_the_only_one_of_another_gets() -> None:
    shares, wanted = Shares(), [Wanted(peer_id="crowd") for _ in range(100)]
    turns: Counter[str | int | None] = Counter()
    for turn in range(100):
        if not any(each.peer_id == "alone" for each in wanted):
            wanted.append(Wanted(peer_id="alone", arrived_s=turn))
        turns.update(serve(shares, wanted, turn + 0.5, budget=1))
        wanted += [Wanted(peer_id="crowd", arrived_s=turn) for _ in range(101 - len(wanted))]
    assert turns == {"crowd": 50, "alone": 50}


def test_decode_steps_go_before_prompts_and_those_before_training() -> None:
    requests = [
        Wanted(peer_id=peer_id, urgency=urgency) for urgency in reversed(Urgency) for peer_id in ("a", None, "b")
    ]
    ordered = Shares().order(requests, 0.0)
    assert [request.urgency for request in ordered] == sorted(request.urgency for request in requests)
    assert [request.peer_id for request in ordered[:3]] == [None, "a", "b"]


@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["a", "b", None]), st.booleans(), st.floats(0.001, 1)), min_size=1, max_size=20
    )
)
def test_what_is_computed_while_nothing_waits_counts_as_a_turn_does(
    turns: list[tuple[str | None, bool, float]],
) -> None:
    planned, alone = Shares(), Shares()
    for number, (peer_id, is_training, seconds) in enumerate(turns):
        for shares in (planned, alone):
            urgency = Urgency.TRAINING if is_training else Urgency.DECODE
            request = Wanted(peer_id=peer_id, urgency=urgency, arrived_s=number)
            if shares is alone and not is_training:
                shares.charge_alone(peer_id, 1, seconds, now_s=number + 0.5)
            else:
                shares.order([request], number + 0.5)
                shares.charge(request, 1)
                shares.charge_time(seconds, is_training=is_training)
    both = [
        Wanted(peer_id=peer_id, urgency=urgency, arrived_s=len(turns) + 1)
        for peer_id in ("a", "b")
        for urgency in (Urgency.TRAINING, Urgency.DECODE)
    ]
    now_s = len(turns) + 2
    assert planned.order(both, now_s) == alone.order(both, now_s)


@given(
    peers=st.lists(st.tuples(st.integers(1, 20), st.floats(0.25, 4)), min_size=2, max_size=5),
    budgets=st.lists(st.integers(1, 64), min_size=30, max_size=100),
    most=st.integers(1, 100),
)
def test_peers_that_always_have_work_get_their_shares(
    peers: list[tuple[int, float]], budgets: list[int], most: int
) -> None:
    weights = {number: weight for number, (_, weight) in enumerate(peers)}
    shares = Shares(weight=lambda peer_id: weights[int(str(peer_id))])
    wanted: list[Wanted] = []
    had: Counter[str | int | None] = Counter()
    for turn, budget in enumerate(budgets):
        for number, (num_requests, _) in enumerate(peers):
            waiting = [each for each in wanted if each.peer_id == number]
            if sum(each.num_tokens_left for each in waiting) <= 64:
                wanted += [
                    Wanted(peer_id=number, arrived_s=turn, num_tokens_left=most) for _ in range(64 + num_requests)
                ]
        had.update(serve(shares, wanted, turn + 0.5, budget))
    normed = [had[number] / weight for number, weight in weights.items()]
    assert max(normed) - min(normed) <= 2 * (most + 64) / min(weights.values())


@given(st.lists(st.floats(0.001, 1), min_size=100, max_size=300))
def test_training_gets_a_ninth_of_the_time(durations: list[float]) -> None:
    shares = Shares()
    requests = [Wanted(peer_id="a"), Wanted(peer_id="b", urgency=Urgency.TRAINING)]
    had = {False: 0.0, True: 0.0}
    for turn, seconds in enumerate(durations):
        is_training = shares.order(requests, float(turn))[0].urgency is Urgency.TRAINING
        had[is_training] += seconds
        shares.charge_time(seconds, is_training=is_training)
    assert abs(had[False] / 8 - had[True]) <= 2


def test_idling_saves_up_nothing() -> None:
    shares = Shares()
    for turn in range(1000):  # a night of training, and of one peer alone
        request = Wanted(peer_id="a", urgency=Urgency.TRAINING, arrived_s=turn, num_tokens_left=100)
        assert shares.order([request], turn + 0.5) == [request]
        shares.charge(request, 100)
        shares.charge_time(1.0, is_training=True)
    wanted = [Wanted(peer_id=peer_id, arrived_s=2000) for peer_id in "ab" for _ in range(400)]
    served = serve(shares, wanted, 2001, budget=600)
    assert abs(served["a"] - served["b"]) <= 100  # the last request of the night


def test_a_peer_that_asks_for_little_has_no_claim_on_more_later() -> None:
    shares, wanted = Shares(), list[Wanted]()
    for turn in range(100):  # all get what they ask for: 16 tokens for one, 1 for the other
        wanted += [Wanted(peer_id="much", arrived_s=turn) for _ in range(16)] + [
            Wanted(peer_id="little", arrived_s=turn)
        ]
        serve(shares, wanted, turn + 0.5, budget=64)
        assert not wanted
    wanted += [Wanted(peer_id=peer_id, arrived_s=100) for peer_id in ("little", "much") for _ in range(100)]
    served = serve(shares, wanted, 101, budget=100)
    assert abs(served["little"] - served["much"]) <= 32


@given(
    st.lists(
        st.builds(
            Wanted,
            peer_id=st.integers(0, 3) | st.none(),
            urgency=st.sampled_from(Urgency),
            arrived_s=st.floats(0, 10),
            num_tokens_left=st.integers(1, 5),
        )
    )
)
def test_all_requests_are_ordered_and_those_of_a_peer_by_arrival(requests: list[Wanted]) -> None:
    ordered = Shares().order(requests, 20.0)
    assert sorted(map(id, ordered)) == sorted(map(id, requests))
    for peer_id in range(4):
        for urgency in Urgency:
            times = [each.arrived_s for each in ordered if (each.peer_id, each.urgency) == (peer_id, urgency)]
            assert times == sorted(times)


def test_peers_that_left_are_forgotten() -> None:
    times: VirtualTimes[int] = VirtualTimes(lambda key: 1.0)
    for peer_id in range(10_000):
        times.activate(peer_id)
        times.charge(peer_id, 1 + peer_id)
        times.retain({peer_id})
    assert len(times) < 2000
