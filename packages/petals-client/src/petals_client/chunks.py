"""Requests that are too large for one message, in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from petals_client.chain import StepRequest
from petals_client.packing import PositionRuns


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of the tokens of a packed batch, and what a request says of them."""

    row_tokens: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    """(first, count) in the packed batch, one for each row of the part."""
    first_row: int = 0
    position_runs: PositionRuns | None = None


def split_columns(request: StepRequest, *max_tokens: int) -> list[tuple[StepRequest, Part]]:
    """Cut a step into steps that follow each other, of at most so many tokens, and at least one column, each.

    Of ``max_tokens`` the first is of the first step, and so on; the last is of all that remain.
    The servers' columns hold each row's tokens at their right end; a cut goes through all rows at one column, so that
    the parts amount to the whole.
    """
    row_tokens = request.row_tokens
    num_columns = max(row_tokens)
    num_rows = sum(count > 0 for count in row_tokens)
    starts = _starts(row_tokens)
    parts: list[tuple[StepRequest, Part]] = []
    right, shrinks = 0, False
    while right < num_columns:
        left = right
        num_tokens = max_tokens[min(len(parts), len(max_tokens) - 1)]
        right = min(left + max(1, num_tokens // num_rows), num_columns)
        bounds = [(max(0, left - (num_columns - count)), max(0, right - (num_columns - count))) for count in row_tokens]
        counts = tuple(last - first for first, last in bounds)
        runs = request.position_runs
        part = Part(
            row_tokens=counts,
            ranges=tuple((start + first, last - first) for start, (first, last) in zip(starts, bounds, strict=True)),
            position_runs=None
            if runs is None
            else tuple(_cut(row, first, last) for row, (first, last) in zip(runs, bounds, strict=True)),
        )
        wanted = request.wanted
        if wanted is not None:
            wanted = min(max(0, wanted - (num_columns - right)), right - left)
        # Parts shrink towards the end so that servers end soon after each other: they are not joined with larger ones.
        shrank, shrinks = shrinks, bool(parts) and sum(counts) < sum(parts[-1][1].row_tokens)
        step = replace(
            request,
            keep=request.keep + left,
            row_tokens=counts,
            row_order=request.row_order if left == 0 else None,
            position_runs=part.position_runs,
            wanted=wanted,
            join_tokens=None if shrinks and not shrank else request.join_tokens,
        )
        parts.append((step, part))
    return parts


def split_rows(row_tokens: Sequence[int], position_runs: PositionRuns | None, max_tokens: int) -> list[Part]:
    """Cut a request without a cache into parts of whole, neighbouring rows with at most ``max_tokens`` tokens each.

    A single row may have more. Rows without tokens are left out.
    """
    starts = _starts(row_tokens)
    parts: list[Part] = []
    rows = [row for row, count in enumerate(row_tokens) if count]
    while rows:
        last = 1
        total = row_tokens[rows[0]]
        while last < len(rows) and rows[last] == rows[0] + last and total + row_tokens[rows[last]] <= max_tokens:
            total += row_tokens[rows[last]]
            last += 1
        chosen, rows = rows[:last], rows[last:]
        parts.append(
            Part(
                row_tokens=tuple(row_tokens[row] for row in chosen),
                ranges=tuple((starts[row], row_tokens[row]) for row in chosen),
                first_row=chosen[0],
                position_runs=None if position_runs is None else tuple(position_runs[row] for row in chosen),
            )
        )
    return parts


def _starts(row_tokens: Sequence[int]) -> list[int]:
    starts = [0]
    for count in row_tokens:
        starts.append(starts[-1] + count)
    return starts[:-1]


def _cut(runs: Sequence[tuple[int, int]], first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The runs of tokens ``first:last`` of a row."""
    result = []
    offset = 0
    for position, count in runs:
        left, right = max(first, offset), min(last, offset + count)
        if left < right:
            result.append((position + left - offset, right - left))
        offset += count
    return tuple(result)
