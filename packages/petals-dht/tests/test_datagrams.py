from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.limits import MAX_CLOCK_SKEW_S, MAX_DATAGRAM_BYTES
from petals_core.swarm_key import SwarmKey
from petals_dht.datagrams import MAX_BODY_BYTES, Datagram, DatagramError, DatagramSeal, Kind, ReplayWindow

NOW_S = 1_800_000_000.0
ALICE, BOB, CAROL = b"a" * 20, b"b" * 20, b"c" * 20
KEY = SwarmKey(b"k" * 32)
bodies = st.binary(max_size=MAX_BODY_BYTES)
keys = st.sampled_from([None, KEY])


def make_seal(own_id: bytes, key: SwarmKey | None = KEY, *, started_at_s: float = NOW_S - 1000) -> DatagramSeal:
    return DatagramSeal(own_id, key, ReplayWindow(started_at_s=started_at_s))


def make_datagram(
    *, kind: Kind = Kind.REQUEST, destination: bytes | None = BOB, body: bytes = b"body", is_client: bool = False
) -> Datagram:
    return Datagram(
        kind=kind, request_id=b"r" * 16, sender=ALICE, destination=destination, is_client=is_client, body=body
    )


def seal_once(
    datagram: Datagram, key: SwarmKey | None = KEY, *, now_s: float = NOW_S, nonce: bytes = b"n" * 12
) -> bytes:
    return make_seal(ALICE, key).seal(datagram, now_s=now_s, nonce=nonce)


def refusal(seal: DatagramSeal, content: bytes, *, now_s: float = NOW_S) -> str:
    with pytest.raises(DatagramError) as caught:
        seal.open(content, now_s=now_s)
    return caught.value.reason


@given(keys, st.sampled_from(Kind), st.sampled_from([None, BOB]), bodies, st.booleans())
def test_what_is_sealed_opens(
    key: SwarmKey | None, kind: Kind, destination: bytes | None, body: bytes, is_client: bool
) -> None:
    datagram = make_datagram(kind=kind, destination=destination, body=body, is_client=is_client)
    content = seal_once(datagram, key)
    assert len(content) <= MAX_DATAGRAM_BYTES
    assert make_seal(BOB, key).open(content, now_s=NOW_S) == datagram


def test_the_largest_body_fills_a_sealed_datagram() -> None:
    assert len(seal_once(make_datagram(body=bytes(MAX_BODY_BYTES)))) == MAX_DATAGRAM_BYTES
    with pytest.raises(DatagramError, match="too large"):
        seal_once(make_datagram(body=bytes(MAX_BODY_BYTES + 1)))
    assert refusal(make_seal(BOB), bytes(MAX_DATAGRAM_BYTES + 1)) == "too large"


@given(st.binary(max_size=MAX_DATAGRAM_BYTES + 10), keys)
def test_garbage_raises_only_datagram_errors(content: bytes, key: SwarmKey | None) -> None:
    for received in (content, b"PD\x01\x01" + content, b"PD\x01\x81" + content):
        with contextlib.suppress(DatagramError):
            make_seal(BOB, key).open(received[:1300], now_s=NOW_S)


@settings(max_examples=300)
@given(st.data())
def test_every_bit_is_authentic(data: st.DataObject) -> None:
    content = bytearray(seal_once(make_datagram()))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    assert refusal(make_seal(BOB), bytes(content)) in ("malformed", "other swarm")


def test_only_members_are_heard() -> None:
    sealed, unsealed = seal_once(make_datagram()), seal_once(make_datagram(), None)
    assert refusal(make_seal(BOB, SwarmKey(b"x" * 32)), sealed) == "other swarm"
    assert refusal(make_seal(BOB, None), sealed) == "other swarm"
    assert refusal(make_seal(BOB), unsealed + bytes(100)) == "other swarm"


def test_a_request_is_taken_once_and_by_one_node() -> None:
    content = seal_once(make_datagram())
    bob = make_seal(BOB)
    assert bob.open(content, now_s=NOW_S)
    assert refusal(bob, content) == "stale"
    assert refusal(make_seal(CAROL), content) == "other node"


def test_a_request_can_not_be_turned_into_a_response() -> None:
    content = bytearray(seal_once(make_datagram()))
    content[3] ^= 0x03
    assert refusal(make_seal(BOB), bytes(content)) == "other swarm"


def test_a_node_does_not_talk_to_itself() -> None:
    assert refusal(make_seal(ALICE), seal_once(make_datagram(destination=None))) == "own"


@pytest.mark.parametrize("kind", Kind)
def test_time_is_checked(kind: Kind) -> None:
    content = seal_once(make_datagram(kind=kind))
    for late_s in (-MAX_CLOCK_SKEW_S - 1, MAX_CLOCK_SKEW_S + 1):
        assert refusal(make_seal(BOB), content, now_s=NOW_S + late_s) == "stale"
    assert make_seal(BOB).open(content, now_s=NOW_S + MAX_CLOCK_SKEW_S - 1)


def test_a_restarted_node_takes_nothing_again() -> None:
    content = seal_once(make_datagram(), now_s=NOW_S)
    assert refusal(make_seal(BOB, started_at_s=NOW_S + 0.5), content, now_s=NOW_S + 1) == "stale"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_nothing_is_admitted_twice_however_small_the_memory(arrivals: list[tuple[int, int]]) -> None:
    window = ReplayWindow(started_at_s=NOW_S, max_nonces=3)
    admitted = []
    for second, number in arrivals:
        seen = (int((NOW_S + second) * 1e6), bytes([number]) * 12)
        if window.admit(*seen, now_s=NOW_S + 5):
            admitted.append(seen)
        assert len(window) <= 3
    assert len(admitted) == len(set(admitted))


def test_the_memory_forgets_what_is_too_old_anyway() -> None:
    window = ReplayWindow(started_at_s=NOW_S)
    assert window.admit(int(NOW_S * 1e6), b"1" * 12, now_s=NOW_S)
    later_s = NOW_S + MAX_CLOCK_SKEW_S + 1
    assert window.admit(int(later_s * 1e6), b"2" * 12, now_s=later_s)
    assert len(window) == 1
