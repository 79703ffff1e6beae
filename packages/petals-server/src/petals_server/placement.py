"""Which blocks a server takes when it is free to choose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def count_coverage(spans: Iterable[tuple[int, int]], num_blocks: int) -> list[int]:
    """How many of the ``spans`` (first block, one past the last) hold each of the model's blocks."""
    coverage = [0] * num_blocks
    for start, end in spans:
        for block in range(max(start, 0), min(end, num_blocks)):
            coverage[block] += 1
    return coverage


def choose_span(coverage: Sequence[int], num_blocks: int) -> tuple[int, int]:
    """The ``num_blocks`` consecutive blocks that need a server most.

    A chain is as strong as its least covered block: of two windows the better is the one with more blocks that nobody
    holds, then with more that one server holds, and so on. Of equal windows the first is taken, so that servers that
    start one after another tile the model from its first block on.
    """
    if not 0 < num_blocks <= len(coverage):
        raise ValueError(f"{num_blocks} of {len(coverage)} blocks")
    starts = range(len(coverage) - num_blocks + 1)
    best = min(starts, key=lambda start: sorted(coverage[start : start + num_blocks]))
    return best, best + num_blocks
