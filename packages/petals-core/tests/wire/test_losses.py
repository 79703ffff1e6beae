"""What is sent again is a loss on the way only where nothing waits there."""

from __future__ import annotations

from petals_core.wire.losses import Losses


def test_packets_lost_without_a_queue_are_told_of_once() -> None:
    losses = Losses()
    told = [losses.note(num_resent=number, rtt_s=0.041, least_rtt_s=0.04) for number in range(10)]
    assert told == [number == 3 for number in range(10)]


def test_packets_that_a_queue_drops_are_no_reason() -> None:
    losses = Losses()
    assert not any(losses.note(num_resent=number, rtt_s=0.09, least_rtt_s=0.04) for number in range(1000))
    # The queue has gone: what it dropped does not count, and nothing more is lost.
    assert not any(losses.note(num_resent=999, rtt_s=0.04, least_rtt_s=0.04) for _ in range(10))


def test_a_connection_that_loses_nothing_stays_as_it_is() -> None:
    losses = Losses()
    assert not any(losses.note(num_resent=0, rtt_s=0.04, least_rtt_s=0.04) for _ in range(1000))
    assert not losses.note(num_resent=2, rtt_s=0.04, least_rtt_s=0.04)
