"""Several chains at once, for batches: what counts is how much passes in a second, not how long one token takes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from petals_core.identity import PeerId
from petals_core.routing.graph import Chain, Server, find_gaps
from petals_core.routing.planner import Lattice, cost_of, plan_chain

_ROUNDS: Final = 12
_MAX_DETOUR: Final = 8.0
"""Chains that cost more than this many times the cheapest would only hold a batch's last parts up."""
_MAX_SERVERS: Final = 64
"""Servers among which a batch is divided."""
_MAX_LOAD: Final = 100.0
_MIN_UNIT_S: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A chain and the share of a batch that is to go through it."""

    chain: Chain
    share: float


def split_flow(
    servers: Iterable[Server], start: int, end: int, *, model_name: str, max_chains: int
) -> tuple[Branch, ...]:
    """Divide a batch among chains so that no server holds the others up; the largest share first.

    The parts of a batch are routed one after another, each by the cheapest chain, where computing costs the more the
    longer a server is busy with the parts before: e times as much when that is as long as the slowest server of the
    first chain takes for one part. So servers that nobody else can stand in for are in all chains, equal ones share,
    and slow ones get little or nothing. Garg and Konemann (1998) show that shortest paths under costs that grow
    exponentially with the load approach the maximum flow.

    Raises:
        MissingBlocksError: some blocks are held by no server.
    """
    known = {server.peer_id: server for server in _choose(list(servers), start, end, max_chains)}
    busy_s: defaultdict[PeerId, float] = defaultdict(float)
    """How long each server computes on the parts so far."""
    parts: Counter[Chain] = Counter()
    limit_s: float | None = None
    unit_s = 1.0
    for _ in range(_ROUNDS if max_chains > 1 else 1):
        loaded = [_with_load(server, busy_s[server.peer_id] / unit_s) for server in known.values()]
        chain = plan_chain(loaded, start, end, model_name=model_name)
        cost_s = cost_of(chain, known.values())
        if limit_s is None:
            limit_s = _MAX_DETOUR * cost_s
            unit_s = max(_MIN_UNIT_S, *((hop.end - hop.start) * known[hop.peer_id].block_s for hop in chain))
        elif cost_s > limit_s:
            break
        elif chain not in parts and len(parts) == max_chains:
            chain = min(parts, key=lambda each: cost_of(each, loaded))
        parts[chain] += 1
        for hop in chain:
            busy_s[hop.peer_id] += (hop.end - hop.start) * known[hop.peer_id].block_s
    total = parts.total()
    return tuple(Branch(chain=chain, share=count / total) for chain, count in parts.most_common())


def _choose(servers: list[Server], start: int, end: int, max_chains: int) -> list[Server]:
    """Those that are in the cheapest chains, so that planning many times does not take long."""
    held = [server for server in servers if server.start < end and server.end > start]
    if len(held) <= _MAX_SERVERS or max_chains == 1 or find_gaps([(s.start, s.end) for s in held], start, end):
        return held
    costs = Lattice(held, start, end).cheapest_through()
    return [held[index] for index in np.argsort(costs, kind="stable")[:_MAX_SERVERS]]


def _with_load(server: Server, load: float) -> Server:
    return server._replace(block_s=server.block_s * math.exp(min(load, _MAX_LOAD))) if load else server
