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
Indices: TypeAlias = NDArray[np.int64]


def plan_chain(
    servers: Iterable[Server],
    start: int,
    end: int,
    *,
    model_name: str,
    previous: Server | None = None,
    following: Server | None = None,
) -> Chain:
    """Return the chain over blocks ``start:end`` with the lowest sum of costs; always the same one of equals.

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
    """Delays of pairs of servers [E], from sources to targets, in the order of targets; each server is a target."""

    def __init__(self, sources: Indices, targets: Indices, delay_s: Costs, num_servers: int) -> None:
        everyone = np.arange(num_servers)
        targets = np.concatenate((targets, everyone))
        order = np.argsort(targets, kind="stable")
        self.sources = np.concatenate((sources, everyone))[order]
        self.delay_s = np.concatenate((delay_s, np.full(num_servers, math.inf)))[order]
        self.starts = np.searchsorted(targets[order], np.arange(num_servers + 1))
        """Where the pairs of each target begin, and where the last one's end [S + 1]."""

    def least(self, source_costs: Costs, first: int, last: int) -> Costs:
        """What it costs to be at each of the targets ``first:last``, when coming from the best source."""
        starts = self.starts[first : last + 1]
        left, right = starts[0], starts[-1]
        known = source_costs.take(self.sources[left:right])
        known += self.delay_s[left:right]
        least: Costs = np.minimum.reduceat(known, starts[:-1] - left)
        return least


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
        columns = np.array([(each.client_s, each.hop_s, each.block_s, each.start, each.end) for each in servers])
        self._order = np.argsort(columns[:, 3], kind="stable")
        """Of all arrays: those that hold a block are near each other."""
        self._client_s, self._hop_s, self._span_block_s, first, self._ends = np.ascontiguousarray(
            columns[self._order].T
        )
        servers = self._servers = [servers[number] for number in self._order.tolist()]
        self._start = start
        blocks = np.arange(start, end)
        ended = np.searchsorted(np.maximum.accumulate(self._ends), blocks, side="right")
        begun = np.searchsorted(first, blocks, side="right")
        self._windows: list[tuple[int, int]] = list(zip(ended.tolist(), begun.tolist(), strict=True))
        """For each block, the part of the servers that all of its holders are in; both ends only grow."""
        self._entry_s = self._client_s
        if previous is not None:
            self._entry_s = np.array([previous.delay_to(each) for each in servers])
        self._exit_s = self._client_s
        if following is not None:
            self._exit_s = np.array([each.delay_to(following) for each in servers])
        before, after, delay_s = _known_pairs(servers)
        is_shorter = delay_s < self._client_s[before] + self._client_s[after]
        last = self._ends
        may_follow = np.maximum(first[before] + 1, first[after]) <= np.minimum(last[before], last[after] - 1)
        matters = is_shorter & may_follow
        self._known = before[matters], after[matters], delay_s[matters]
        self._pairs = _Pairs(*self._known, len(servers))

    def cheapest(self) -> Chain:
        """The chain with the lowest sum; O(B x (S + E))."""
        reached = self._reach()
        row = len(reached) - 1
        left, right = self._windows[row]
        index = left + int(np.argmin(reached[row] + self._exit_s[left:right]))
        hops: list[Hop] = []
        last = self._start + len(reached)
        for row in range(len(reached) - 1, 0, -1):
            before_left, before_right = self._windows[row - 1]
            stay_s = reached[row - 1][index - before_left] if before_left <= index < before_right else math.inf
            left, right = self._windows[row]
            if reached[row][index - left] < stay_s + self._span_block_s[index]:
                block = self._start + row
                hops.append(Hop(peer_id=self._servers[index].peer_id, start=block, end=last))
                last, index = block, self._cheapest_source(row - 1, reached[row - 1], index)
        hops.append(Hop(peer_id=self._servers[index].peer_id, start=self._start, end=last))
        hops.reverse()
        return tuple(hops)

    def cheapest_through(self) -> Costs:
        """For each server, the cost of the cheapest chain in which it computes one block at least [S]."""
        best = np.full(len(self._servers), math.inf)
        for (left, right), reached, left_s in zip(self._windows, self._reach(), self._remain(), strict=True):
            np.minimum(best[left:right], reached + left_s, out=best[left:right])
        given = np.empty_like(best)
        given[self._order] = best
        return given

    def _reach(self) -> list[Costs]:
        """For each block, what the cheapest way to have computed all up to it costs, on each server of its window.

        Infinite where the server does not hold the block.
        """
        left, right = self._windows[0]
        rows = [self._entry_s[left:right] + self._hop_s[left:right] + self._block_s(0)]
        reached = np.full(len(self._servers), math.inf)
        for row in range(1, len(self._windows)):
            reached[:left] = math.inf
            reached[left:right] = rows[-1]
            by_client_s = (rows[-1] + self._client_s[left:right]).min()
            left, right = self._windows[row]
            costs = self._client_s[left:right] + by_client_s
            np.minimum(costs, self._pairs.least(reached, left, right), out=costs)
            costs += self._hop_s[left:right]
            np.minimum(costs, reached[left:right], out=costs)
            costs += self._block_s(row)
            rows.append(costs)
        return rows

    def _remain(self) -> list[Costs]:
        """For each block, what the cheapest way from having computed it to the end costs, on each server of its window.

        Means nothing where the server does not hold the block.
        """
        before, after, delay_s = self._known
        pairs = _Pairs(after, before, delay_s, len(self._servers))
        left, right = self._windows[-1]
        rows = [self._exit_s[left:right]]
        entered = np.full(len(self._servers), math.inf)
        for row in range(len(self._windows) - 1, 0, -1):
            next_left = left
            stay = rows[-1] + self._block_s(row)
            entered[right:] = math.inf
            entered[left:right] = stay + self._hop_s[left:right]
            by_client_s = (entered[left:right] + self._client_s[left:right]).min()
            left, right = self._windows[row - 1]
            costs = self._client_s[left:right] + by_client_s
            np.minimum(costs, pairs.least(entered, left, right), out=costs)
            lasting = costs[next_left - left :]
            np.minimum(lasting, stay[: right - next_left], out=lasting)
            rows.append(costs)
        rows.reverse()
        return rows

    def _block_s(self, row: int) -> Costs:
        """The cost of a block on each server of its window; infinite where the server does not hold it."""
        left, right = self._windows[row]
        return np.where(self._ends[left:right] > self._start + row, self._span_block_s[left:right], math.inf)

    def _cheapest_source(self, row: int, reached: Costs, target: int) -> int:
        """From where a server is best entered behind a block, with what it costs to have ``reached`` that."""
        left, right = self._windows[row]
        by_client = reached + self._client_s[left:right]
        source = left + int(np.argmin(by_client))
        cost_s = float(by_client[source - left] + self._client_s[target])
        first, last = self._pairs.starts[target : target + 2].tolist()
        for other, delay_s in zip(
            self._pairs.sources[first:last].tolist(), self._pairs.delay_s[first:last].tolist(), strict=True
        ):
            if left <= other < right and reached[other - left] + delay_s < cost_s:
                source, cost_s = other, float(reached[other - left] + delay_s)
        return source


def _known_pairs(servers: Sequence[Server]) -> tuple[Indices, Indices, Costs]:
    """Sources, targets and delays of the pairs [E] of which the first has measured the delay to the second."""
    numbers = {server.peer_id.digest: number for number, server in enumerate(servers)}
    before = np.repeat(np.arange(len(servers)), [len(server.next_delays) for server in servers])
    known = list(itertools.chain.from_iterable(server.next_delays for server in servers))
    after = np.array([numbers.get(digest, -1) for digest, _ in known], dtype=np.int64)
    delay_s = np.array([delay_s for _, delay_s in known], dtype=np.float64)
    is_known = (after >= 0) & (before != after)
    return before[is_known], after[is_known], delay_s[is_known]


def _is_one(gaps: list[tuple[int, int]]) -> bool:
    return len(gaps) == 1 and gaps[0][1] - gaps[0][0] == 1
