import pytest

from petals_core.errors import ProtocolError
from petals_core.wire.keepalive import MAX_PINGS_UNDER_WAY, Allowance, Keepalive


def keepalive() -> Keepalive:
    return Keepalive(ping_interval_s=10, idle_timeout_s=30, now=100)


def test_a_silent_peer_is_pinged_at_every_interval_and_then_dead() -> None:
    peer = keepalive()
    assert peer.next_wakeup() == 110
    assert not peer.wants_ping(109.9)
    assert peer.wants_ping(110)
    peer.ping(110)
    assert not peer.wants_ping(119.9)
    assert peer.next_wakeup() == 120
    peer.ping(120)
    assert peer.next_wakeup() == 130
    assert not peer.is_dead(129.9)
    assert peer.is_dead(130)


def test_any_sign_of_life_starts_the_silence_anew() -> None:
    peer = keepalive()
    peer.heard(125)
    assert not peer.is_dead(154)
    assert peer.next_wakeup() == 135


def test_a_pong_tells_the_round_trip_once() -> None:
    peer = keepalive()
    first, second = peer.ping(110), peer.ping(111)
    assert first is not None
    assert second is not None
    assert peer.pong(second, 111.25) == 0.25
    assert peer.pong(first, 111.5) == 1.5
    with pytest.raises(ProtocolError):
        peer.pong(first, 112)


def test_pings_under_way_are_bounded() -> None:
    peer = keepalive()
    assert None not in [peer.ping(100) for _ in range(MAX_PINGS_UNDER_WAY)]
    assert peer.ping(100) is None


def test_an_allowance_has_a_burst_and_a_rate() -> None:
    allowance = Allowance(burst=3, rate_per_s=2, now=0)
    assert [allowance.take(0) for _ in range(4)] == [True, True, True, False]
    assert [allowance.take(1) for _ in range(3)] == [True, True, False]
    assert [allowance.take(1000) for _ in range(4)] == [True, True, True, False]
