from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_dht.monitor.figures import (
    ASCII,
    UNICODE,
    count_text,
    delay_text,
    duration_text,
    rate_text,
    ruler,
    span_bar,
    sparkline,
)


def test_sparklines() -> None:
    assert sparkline([0, 1, 7], 10, UNICODE) == "▁▂▇"
    assert sparkline([0.0, 0.0], 10, UNICODE) == "▁▁"
    assert sparkline([5, 5, 1, 1], 2, ASCII) == "#."
    assert sparkline([], 10, UNICODE) == sparkline([1], 0, UNICODE) == ""
    assert sparkline([0, 0.001, 100], 3, UNICODE) == "▁▂▇"


@given(st.lists(st.floats(0, 1e12), max_size=300), st.integers(1, 80))
def test_a_sparkline_never_takes_more_room(samples: list[float], width: int) -> None:
    assert len(sparkline(samples, width, UNICODE)) == min(width, len(samples))


@given(st.integers(1, 1024), st.data())
def test_a_span_is_seen_however_short(num_blocks: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_blocks - 1))
    end = data.draw(st.integers(start + 1, num_blocks))
    width = data.draw(st.integers(1, 100))
    bar = span_bar(start, end, num_blocks, width, ASCII)
    assert len(bar) == min(width, num_blocks)
    assert "#" in bar
    if width >= num_blocks:
        assert bar == "." * start + "#" * (end - start) + "." * (num_blocks - end)


def test_rulers() -> None:
    assert ruler(12, 80) == "0         10"
    assert ruler(80, 40) == "0         20        40        60"
    assert ruler(11, 80) == "0"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, ""), (0, "0"), (950, "950"), (999.6, "1.0k"), (12_345, "12.3k"), (99_960, "100k"), (999_700, "1.0M"),
        (4.1e6, "4.1M"), (2**40, "1.1T"), (1e15, "huge"),
    ],
)  # fmt: skip
def test_counts(count: float | None, text: str) -> None:
    assert count_text(count) == text


@given(st.floats(0, 1e14))
def test_numbers_fit_their_columns(number: float) -> None:
    assert len(count_text(number)) <= 5
    assert len(rate_text(number)) <= 5


def test_times() -> None:
    assert [delay_text(each) for each in (None, 0.0004, 0.0854, 0.9994, 2.46)] == ["", "0.4ms", "85ms", "999ms", "2.5s"]
    assert [duration_text(each) for each in (-1, 59.9, 60, 7300, 90_000)] == ["0s", "59s", "1m", "2h", "1d"]
