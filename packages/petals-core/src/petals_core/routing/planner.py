"""The cheapest chain: a shortest path over (server, block).

A way through the swarm visits nodes (server, block). From a block to the next one the server is either kept, at the
cost of its block alone, or changed, at the cost of the delay between the two and of a visit too. The way begins with
the delay from the client to the first server and ends with the one from the last server back.

Letters: S servers, B blocks, E pairs of servers whose delay is known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from petals_core.errors import MissingBlocksError
from petals_core.routing.graph import Chain, Hop, Server, describe_blocks, find_gaps

Costs: TypeAlias = NDArray[np.float64]


def plan_chain(
    servers: Iterable[Server],
    start: int,
    end: int,
    *,
    model_name: str,
    previous: Server | None = None,
    following: Server | None = None,
) -> Chain:
    """Return the chain over blocks ``start:end`` with the lowest sum of costs; the first given of equals.

    ``previous`` and ``following`` are the servers between which it is to stand; None: the client. O(B x (S + E)).

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
    return Lattice(candidates, start, end, previous=previous, following=following).cheapest()


def cost_of(
    chain: Chain, servers: Iterable[Server], *, previous: Server | None = None, following: Server | None = None
) -> float:
    """Sum the costs of a chain of some of the ``servers``."""
    by_peer = {server.peer_id: server for server in servers}
    hops = [by_peer[hop.peer_id] for hop in chain]
    total_s = hops[0].client_s if previous is None else previous.delay_to(hops[0])
    total_s += hops[-1].client_s if following is None else hops[-1].delay_to(following)
    total_s += sum(before.delay_to(after) for before, after in itertools.pairwise(hops))
    return total_s + sum(
        server.hop_s + (hop.end - hop.start) * server.block_s for hop, server in zip(chain, hops, strict=True)
    )


class _Pairs:
    """Delays of pairs of servers [E], from sources to targets, in the order of targets."""

    def __init__(self, sources: NDArray[np.int64], targets: NDArray[np.int64], delay_s: Costs) -> None:
        order = np.argsort(targets, kind="stable")
        self.sources, self.targets, self.delay_s = sources[order], targets[order], delay_s[order]
        self._starts = np.flatnonzero(np.diff(self.targets, prepend=-1))
        self._unique = self.targets[self._starts]

    def lower(self, costs: Costs, source_costs: Costs) -> None:
        """Make the costs [S] of being at targets those of coming from a source, where that is less."""
        if len(self._unique):
            known = source_costs.take(self.sources)
            known += self.delay_s
            np.minimum.at(costs, self._unique, np.minimum.reduceat(known, self._starts))


class Lattice:
    """The costs of all ways over blocks ``start:end``, as arrays."""

    def __init__(
        self,
        servers: Sequence[Server],
        start: int,
        end: int,
        *,
        previous: Server | None = None,
        following: Server | None = None,
    ) -> None:
        """Each of the blocks is held by one of the ``servers`` at least, and each server holds one of the blocks."""
        self._servers = servers
        self._start = start
        self._end = end
        columns = np.array([(each.client_s, each.hop_s, each.block_s, each.start, each.end) for each in servers])
        self._client_s, self._hop_s, block_s, first, last = np.ascontiguousarray(columns.T)
        blocks = np.arange(start, end)[:, None]
        self._block_s: Costs = np.where((first <= blocks) & (blocks < last), block_s, math.inf)
        """[B, S]; infinite where the server does not hold the block."""
        self._entry_s = self._client_s
        if previous is not None:
            self._entry_s = np.array([previous.delay_to(each) for each in servers])
        self._exit_s = self._client_s
        if following is not None:
            self._exit_s = np.array([each.delay_to(following) for each in servers])
        before, after, delay_s = _known_pairs(servers)
        is_shorter = delay_s < self._client_s[before] + self._client_s[after]
        may_follow = np.maximum(first[before] + 1, first[after]) <= np.minimum(last[before], last[after] - 1)
        matters = is_shorter & may_follow
        before, after, delay_s = before[matters], after[matters], delay_s[matters]
        self._pairs = _Pairs(before, after, delay_s)
        self._reverse_pairs = _Pairs(after, before, delay_s)

    def cheapest(self) -> Chain:
        """The chain with the lowest sum; O(B x (S + E))."""
        reached = self.reach()
        index = int(np.argmin(reached[-1] + self._exit_s))
        hops: list[Hop] = []
        last = self._end
        for block in range(self._end - 1, self._start, -1):
            row = block - self._start
            before = reached[row - 1]
            if reached[row, index] < before[index] + self._block_s[row, index]:
                hops.append(Hop(peer_id=self._servers[index].peer_id, start=block, end=last))
                last, index = block, self._cheapest_source(before, index)
        hops.append(Hop(peer_id=self._servers[index].peer_id, start=self._start, end=last))
        hops.reverse()
        return tuple(hops)

    def reach(self) -> Costs:
        """The cost of the cheapest way to have computed all blocks up to each one on each server [B, S]."""
        reached = np.empty_like(self._block_s)
        reached[0] = self._entry_s + self._hop_s + self._block_s[0]
        for row in range(1, len(reached)):
            before = reached[row - 1]
            entry = (before + self._client_s).min() + self._client_s
            self._pairs.lower(entry, before)
            reached[row] = np.minimum(before, entry + self._hop_s) + self._block_s[row]
        return reached

    def remain(self) -> Costs:
        """The cost of the cheapest way from having computed each block on each server to the end [B, S]."""
        left = np.empty_like(self._block_s)
        left[-1] = self._exit_s
        for row in range(len(left) - 2, -1, -1):
            stay = left[row + 1] + self._block_s[row + 1]
            entered = stay + self._hop_s
            change = (entered + self._client_s).min() + self._client_s
            self._reverse_pairs.lower(change, entered)
            left[row] = np.minimum(stay, change)
        return left

    def cheapest_through(self) -> Costs:
        """For each server, the cost of the cheapest chain in which it computes one block at least [S]."""
        through = self.reach() + self.remain()
        through[np.isinf(self._block_s)] = math.inf
        best: Costs = through.min(axis=0)
        return best

    def _cheapest_source(self, before: Costs, target: int) -> int:
        """From where a server is best entered."""
        by_client = before + self._client_s
        source = int(np.argmin(by_client))
        cost = float(by_client[source] + self._client_s[target])
        pairs = self._pairs
        first, last = np.searchsorted(pairs.targets, [target, target + 1])
        if first < last:
            known = before[pairs.sources[first:last]] + pairs.delay_s[first:last]
            best = int(np.argmin(known))
            if known[best] < cost:
                return int(pairs.sources[first + best])
        return source


def _known_pairs(servers: Sequence[Server]) -> tuple[NDArray[np.int64], NDArray[np.int64], Costs]:
    """Sources, targets and delays of the pairs [E] of which the first has measured the delay to the second."""
    numbers = {server.peer_id.digest: number for number, server in enumerate(servers)}
    before = np.repeat(np.arange(len(servers)), [len(server.next_s) for server in servers])
    after = np.array([numbers.get(digest, -1) for server in servers for digest in server.next_s], dtype=np.int64)
    delay_s = np.array([delay_s for server in servers for delay_s in server.next_s.values()], dtype=np.float64)
    is_known = (after >= 0) & (before != after)
    return before[is_known], after[is_known], delay_s[is_known]


def _is_one(gaps: list[tuple[int, int]]) -> bool:
    return len(gaps) == 1 and gaps[0][1] - gaps[0][0] == 1
