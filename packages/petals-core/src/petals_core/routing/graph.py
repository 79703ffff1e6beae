"""What the planner sees: servers with their spans and costs, and the chain that it makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from petals_core.identity import PeerId
from petals_core.next_delays import NextDelays


class Server(NamedTuple):
    """A live server that holds blocks ``start:end``, and what using it costs, in seconds.

    A tuple, because every plan makes one of each server of the swarm.
    """

    peer_id: PeerId
    start: int
    end: int
    client_s: float
    """One-way delay between it and the client, measured or assumed."""
    hop_s: float
    """Cost of visiting it at all, beside the delays: software, its reputation, a cache without room."""
    block_s: float
    """Cost of each block that it computes."""
    next_delays: NextDelays = NextDelays()
    """To few others, as it announced them."""

    def delay_to(self, other: Server) -> float:
        """One-way delay to the next server of a chain: what this one has measured, and never more than by the client.

        Where it has measured none, this is the triangle inequality's upper bound, which is also what it costs to
        have the client carry the states. The planner takes the least of many sums: with estimates that err to both
        sides it would choose those that err to the low one.
        """
        known_s = self.measured_delay_to(other)
        by_client_s = self.client_s + other.client_s
        return by_client_s if known_s is None else min(by_client_s, known_s)

    def measured_delay_to(self, other: Server) -> float | None:
        """The delay that it announced to another one; None: it announced none."""
        return self.next_delays.get(other.peer_id.digest)


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
