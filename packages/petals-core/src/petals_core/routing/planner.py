"""The cheapest chain: a shortest path over (server, block)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

from petals_core.errors import MissingBlocksError
from petals_core.routing.graph import Chain, Hop, Server, describe_blocks, find_gaps


class Shuffler(Protocol):
    """Source of randomness, such as ``random.Random``."""

    def shuffle(self, x: list[Any], /) -> None: ...


def plan_chain(servers: Iterable[Server], start: int, end: int, *, model_name: str, rng: Shuffler) -> Chain:
    """Return the chain over blocks ``start:end`` with the lowest sum of costs; equals are chosen among at random.

    The path visits (server, block) nodes: from block to block a server is either kept, at the cost of its block alone,
    or changed, at the cost of a hop too. O(servers x blocks).

    Raises:
        MissingBlocksError: some blocks are held by no server; the text names them.
    """
    assert 0 <= start < end
    candidates = [server for server in servers if server.start < end and server.end > start]
    gaps = find_gaps(((server.start, server.end) for server in candidates), start, end)
    if gaps:
        raise MissingBlocksError(
            f"{describe_blocks(gaps)} of {model_name} {'is' if _is_one(gaps) else 'are'} held by no live server; "
            "wait for one, or start one: petals-server serve"
        )
    rng.shuffle(candidates)  # The first of equals wins below.

    best = 0.0
    """Cost of the cheapest way to have computed all blocks up to here."""
    best_server: int | None = None
    costs = [math.inf] * len(candidates)
    """The same for ways that end at each server."""
    switches: list[list[bool]] = []
    """Whether the cheapest way to (block, server) came from another server."""
    finals: list[int] = []
    """The server at which the cheapest way to behind each block ends."""
    for block in range(start, end):
        switched = [False] * len(candidates)
        after = [math.inf] * len(candidates)
        for index, server in enumerate(candidates):
            if server.start <= block < server.end:
                change = best + server.hop_s
                switched[index] = change < costs[index]
                after[index] = min(change, costs[index]) + server.block_s
        costs = after
        best_server = min(range(len(candidates)), key=costs.__getitem__)
        best = costs[best_server]
        switches.append(switched)
        finals.append(best_server)

    assert best_server is not None
    hops: list[Hop] = []
    last, index = end, best_server
    for block in range(end - 1, start - 1, -1):
        if switches[block - start][index]:
            hops.append(Hop(peer_id=candidates[index].peer_id, start=block, end=last))
            last = block
            if block > start:
                index = finals[block - 1 - start]
    hops.reverse()
    return tuple(hops)


def _is_one(gaps: list[tuple[int, int]]) -> bool:
    return len(gaps) == 1 and gaps[0][1] - gaps[0][0] == 1
