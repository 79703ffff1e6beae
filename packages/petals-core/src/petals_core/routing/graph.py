"""What the planner sees: servers with their spans and costs, and the chain that it makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from petals_core.identity import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A live server that holds blocks ``start:end``, and what using it costs."""

    peer_id: PeerId
    start: int
    end: int
    hop_s: float
    """Cost of visiting it at all: the trip there and back, its queue, its reputation."""
    block_s: float
    """Cost of each block that it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One server of a chain and the blocks ``start:end`` that it computes there."""

    peer_id: PeerId
    start: int
    end: int


Chain = tuple[Hop, ...]
"""Hops that follow each other without gap or overlap."""


def find_gaps(spans: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of ``start:end`` that no span covers, in order."""
    gaps = []
    position = start
    for first, last in sorted(spans):
        if position >= end:
            break
        if first > position:
            gaps.append((position, min(first, end)))
        position = max(position, last)
    if position < end:
        gaps.append((position, end))
    return gaps


def describe_blocks(ranges: Sequence[tuple[int, int]]) -> str:
    """Name blocks for people: ``block 3``, ``blocks 3:5 and 7:9``."""
    names = [f"{first}:{last}" for first, last in ranges]
    if len(ranges) == 1 and ranges[0][1] - ranges[0][0] == 1:
        return f"block {ranges[0][0]}"
    return "blocks " + (", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0])
