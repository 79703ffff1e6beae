"""The announced speed follows what is observed, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_server.speed import AVERAGING_S, MAX_CORRECTION, Speed, Speedometer

RATES = st.floats(0.01, 1e6)


def speed(rate: float) -> Speed:
    return Speed(decode_tokens_per_s=rate, forward_tokens_per_s=10 * rate)


def test_a_slower_machine_shows_within_minutes() -> None:
    meter = Speedometer(speed(100.0), now_s=0.0)
    assert meter.speed == speed(100.0)
    for now_s in range(1, 601):
        meter.observe(speed(25.0), now_s=float(now_s))
        if now_s == AVERAGING_S:  # in the logarithm, 1 - 1/e of the way
            assert meter.speed.decode_tokens_per_s == pytest.approx(41.6, abs=0.1)
    assert meter.speed.decode_tokens_per_s == pytest.approx(25.0, rel=0.01)
    assert meter.speed.forward_tokens_per_s == pytest.approx(250.0, rel=0.01)


@given(RATES, st.lists(st.tuples(RATES, st.floats(-10, 1000)), min_size=1))
def test_it_stays_between_what_was_measured_and_observed(measured: float, events: list[tuple[float, float]]) -> None:
    meter, now_s = Speedometer(speed(measured), now_s=0.0), 0.0
    seen = [measured]
    for rate, pause_s in events:
        now_s += pause_s
        seen.append(min(max(rate, measured / MAX_CORRECTION), measured * MAX_CORRECTION))
        now = meter.observe(speed(rate), now_s=now_s).decode_tokens_per_s
        assert min(seen) * (1 - 1e-9) <= now <= max(seen) * (1 + 1e-9)


@given(RATES, st.floats(0, 1e6))
def test_idling_changes_nothing(measured: float, pause_s: float) -> None:
    meter = Speedometer(speed(measured), now_s=0.0)
    meter.observe(speed(2 * measured), now_s=1e9)
    now = meter.speed
    assert meter.observe(speed(2 * measured), now_s=1e9 + pause_s).decode_tokens_per_s == pytest.approx(
        now.decode_tokens_per_s
    )


def test_how_often_it_is_asked_makes_no_difference() -> None:
    often, seldom = Speedometer(speed(1.0), now_s=0.0), Speedometer(speed(1.0), now_s=0.0)
    for now_s in range(1, 101):
        often.observe(speed(3.0), now_s=float(now_s))
    seldom.observe(speed(3.0), now_s=100.0)
    assert often.speed.decode_tokens_per_s == pytest.approx(seldom.speed.decode_tokens_per_s)
