"""Connections are paced where losses or pauses would keep them slow, and are told so once."""

from __future__ import annotations

import pytest

from petals_core.wire.pacing import PacingChoice, beginning_s


def test_packets_lost_without_a_queue_are_told_of_once() -> None:
    choice = PacingChoice()
    told = [choice.note(num_resent=number, rtt_s=0.041, least_rtt_s=0.04, bytes_per_s=None) for number in range(10)]
    assert told == [number == 3 for number in range(10)]


def test_packets_that_a_queue_drops_are_no_reason() -> None:
    choice = PacingChoice()
    link = {"least_rtt_s": 0.04, "bytes_per_s": 1.2e6}
    assert not any(choice.note(num_resent=number, rtt_s=0.09, **link) for number in range(1000))
    # The queue has gone: what it dropped does not count, and nothing more is lost.
    assert not any(choice.note(num_resent=999, rtt_s=0.04, **link) for _ in range(10))


def test_a_connection_that_loses_nothing_stays_as_it_is() -> None:
    choice = PacingChoice()
    link = {"rtt_s": 0.04, "least_rtt_s": 0.04, "bytes_per_s": None}
    assert not any(choice.note(num_resent=0, **link) for _ in range(1000))
    assert not choice.note(num_resent=2, **link)


@pytest.mark.parametrize(
    ("mbit", "rtt_s", "is_paced"),
    [
        (20, 0.04, True),
        (100, 0.04, True),
        (1000, 0.005, False),
        (100, 0.1, True),
        (0.1, 0.3, False),
        (1e4, 1e-4, False),
    ],
)
def test_a_link_that_holds_much_is_a_reason(mbit: float, rtt_s: float, is_paced: bool) -> None:
    choice = PacingChoice()
    assert not choice.note(num_resent=0, rtt_s=rtt_s, least_rtt_s=rtt_s, bytes_per_s=None)
    link = {"num_resent": 0, "rtt_s": 2 * rtt_s, "least_rtt_s": rtt_s, "bytes_per_s": mbit * 1e6 / 8}
    assert [choice.note(**link) for _ in range(3)] == [is_paced, False, False]


def test_how_long_a_connection_begins() -> None:
    assert beginning_s(1e6, 0.014) == 0, "all goes in the first round trip"
    assert beginning_s(8e6, 0.014) == pytest.approx(0.042), "and then twice as much in each"
