"""Parts of a request, put together, are the request."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from petals_client.chain import StepRequest
from petals_client.chunks import split_columns, split_rows

counts = st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any).map(tuple)


@settings(max_examples=60)
@given(counts, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.none() | st.integers(0, 12))
def test_columns(row_tokens: tuple[int, ...], max_tokens: list[int], wanted: int | None) -> None:
    runs = tuple(((10 * row, count),) if count else () for row, count in enumerate(row_tokens))
    request = StepRequest(
        keep=7, row_tokens=row_tokens, row_order=(0,) * len(row_tokens), position_runs=runs, wanted=wanted
    )
    width = max(row_tokens)
    rows: list[list[int]] = [[] for _ in row_tokens]
    positions: list[list[int]] = [[] for _ in row_tokens]
    columns = 7
    results = [0] * len(row_tokens)
    for index, (step, part) in enumerate(split_columns(request, *max_tokens)):
        assert step.keep == columns
        assert step.row_order == (request.row_order if index == 0 else None)
        assert step.row_tokens == part.row_tokens == tuple(count for _, count in part.ranges)
        num_rows = sum(count > 0 for count in row_tokens)
        assert sum(step.row_tokens) <= max(max_tokens[min(index, len(max_tokens) - 1)], num_rows)
        columns += max(step.row_tokens)
        results = [result + count for result, count in zip(results, step.result_tokens, strict=True)]
        for row, (first, count) in enumerate(part.ranges):
            rows[row] += range(first, first + count)
            assert step.position_runs is not None
            positions[row] += [first + i for first, count in step.position_runs[row] for i in range(count)]
    assert columns == 7 + width
    assert tuple(results) == request.result_tokens
    starts = [sum(row_tokens[:row]) for row in range(len(row_tokens))]
    assert rows == [list(range(start, start + count)) for start, count in zip(starts, row_tokens, strict=True)]
    assert positions == [list(range(10 * row, 10 * row + count)) for row, count in enumerate(row_tokens)]


def test_smaller_parts_are_joined_only_with_each_other() -> None:
    request = StepRequest(keep=0, row_tokens=(30,), join_tokens=16)
    parts = split_columns(request, 2, 4, 8, 8, 5, 3)
    assert [(sum(step.row_tokens), step.join_tokens) for step, _ in parts] == [
        (2, 16), (4, 16), (8, 16), (8, 16), (5, None), (3, 16),
    ]  # fmt: skip


@settings(max_examples=60)
@given(counts, st.integers(1, 12))
def test_rows(row_tokens: tuple[int, ...], max_tokens: int) -> None:
    runs = tuple(((10 * row, count),) if count else () for row, count in enumerate(row_tokens))
    seen = []
    for part in split_rows(row_tokens, runs, max_tokens):
        assert len(part.row_tokens) == 1 or sum(part.row_tokens) <= max_tokens
        rows = range(part.first_row, part.first_row + len(part.row_tokens))
        assert part.row_tokens == tuple(row_tokens[row] for row in rows)
        assert part.position_runs == tuple(runs[row] for row in rows)
        assert part.ranges == tuple((sum(row_tokens[:row]), row_tokens[row]) for row in rows)
        seen += rows
    assert seen == [row for row, count in enumerate(row_tokens) if count]
