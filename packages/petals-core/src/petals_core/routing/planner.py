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
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from petals_core.errors import MissingBlocksError
from petals_core.identity import PeerId
from petals_core.next_delays import NextDelays
from petals_core.routing.graph import Chain, Hop, Server, describe_blocks, find_gaps

Costs: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]
_RECORD: Final = np.dtype([("digest", "<u8", 4), ("delay_s", "<f8")])
"""Of ``NextDelays``."""


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
    chain = Lattice(candidates, start, end, previous=previous, following=following).cheapest() if candidates else None
    if chain is None:
        gaps = find_gaps(((server.start, server.end) for server in candidates), start, end)
        raise MissingBlocksError(
            f"{describe_blocks(gaps)} of {model_name} {'is' if _is_one(gaps) else 'are'} held by no live server; "
            "wait for one, or start one: petals-server serve"
        )
    return chain


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


class Lattice:
    """The costs of all ways over blocks ``start:end``, as arrays. A row is a block."""

    def __init__(
        self,
        servers: Sequence[Server],
        start: int,
        end: int,
        *,
        previous: Server | None = None,
        following: Server | None = None,
    ) -> None:
        """``servers``: one at least, each of which holds one of the blocks at least."""
        self._peer_ids, starts, ends, client_s, hop_s, block_s, next_delays = zip(*servers, strict=True)
        self._start = start
        self._num_rows = end - start
        self._first = np.maximum(np.array(starts), start) - start
        self._last = np.minimum(np.array(ends), end) - start
        self._client_s: Costs = np.array(client_s, dtype=np.float64)
        self._hop_s: Costs = np.array(hop_s, dtype=np.float64)
        self._block_s: Costs = np.array(block_s, dtype=np.float64)
        self._entry_s = self._exit_s = self._client_s
        if previous is not None:
            self._entry_s = np.array([previous.delay_to(each) for each in servers])
        if following is not None:
            self._exit_s = np.array([each.delay_to(following) for each in servers])
        before, after, delay_s = _known_pairs(self._peer_ids, next_delays)
        opened, closed = _switches(self._first, self._last, before, after)
        is_shorter = delay_s < self._client_s[before] + self._client_s[after]
        matters = np.flatnonzero((opened < closed) & is_shorter)
        self._known = before[matters], after[matters], delay_s[matters]

    def cheapest(self) -> Chain | None:
        """The chain with the lowest sum, O(B x (S + E)); None where some block is held by nobody."""
        rows = self._num_rows + 1
        num_begun, num_ended = np.bincount(self._first, minlength=rows), np.bincount(self._last, minlength=rows)
        if not np.cumsum(num_begun - num_ended)[:-1].all():
            return None
        reached = self._reach()
        index = int((reached[-1] + self._exit_s).argmin())
        hops: list[Hop] = []
        last = self._num_rows
        for row in range(self._num_rows - 1, 0, -1):
            if reached[row, index] < reached[row - 1, index] + self._block_s[index]:
                hops.append(self._hop(index, row, last))
                last, index = row, self._cheapest_source(reached[row - 1], index)
        hops.append(self._hop(index, 0, last))
        hops.reverse()
        return tuple(hops)

    def cheapest_through(self) -> Costs:
        """For each server, the cost of the cheapest chain in which it computes one block at least [S]."""
        ways = self._reach()
        ways += self._remain()
        return ways.min(axis=0) - self._hop_s - self._block_s

    def _hop(self, index: int, first: int, last: int) -> Hop:
        return Hop(peer_id=self._peer_ids[index], start=self._start + first, end=self._start + last)

    def _reach(self) -> Costs:
        """What the cheapest way from the client to having computed a block on a server costs [B, S].

        Infinite where the server does not hold the block.
        """
        return self._sweep(self._first, self._last, self._entry_s, *self._known)

    def _remain(self) -> Costs:
        """What the cheapest way from before a block, which the server computes, to the client costs [B, S].

        It is the way of the client to the server when all is turned around.
        """
        before, after, delay_s = self._known
        first, last = self._num_rows - self._last, self._num_rows - self._first
        return self._sweep(first, last, self._exit_s, after, before, delay_s)[::-1]

    def _sweep(
        self, first: Indices, last: Indices, entry_s: Costs, sources: Indices, targets: Indices, delay_s: Costs
    ) -> Costs:
        """Go through the blocks, of which the servers have ``first:last``; a plan's time is spent here.

        A server is entered by the client from the best one, or from one whose delay to it is known, or was not left.
        """
        changes_at = np.concatenate((first, last))
        changes, until = _order(changes_at, self._num_rows)
        changed = changes % len(first)
        changed_s = np.concatenate((self._block_s, np.full(len(first), math.inf)))[changes]

        opened, closed = _switches(first, last, sources, targets)
        order, right_at = _order(opened, self._num_rows)
        left_at = np.searchsorted(
            np.maximum.accumulate(closed[order]), np.arange(self._num_rows), side="right"
        ).tolist()
        sources, targets = sources[order], targets[order]
        entry_by_known_s = delay_s[order] + self._hop_s[targets]
        known_s = np.empty_like(entry_by_known_s)

        entry_by_client_s = self._client_s + self._hop_s
        exit_by_client_s = np.empty_like(entry_by_client_s)
        block_s = np.full(len(first), math.inf)
        """Of the row; infinite where the server does not hold it."""
        reached = np.empty((self._num_rows, len(first)))
        np.add(entry_s, self._hop_s, out=reached[0])
        since = 0
        for row, costs in enumerate(reached):
            if row > 0:
                before = reached[row - 1]
                np.add(before, self._client_s, out=exit_by_client_s)
                np.add(entry_by_client_s, exit_by_client_s[exit_by_client_s.argmin()], out=costs)
                left, right = left_at[row], right_at[row]
                known = known_s[left:right]
                before.take(sources[left:right], out=known, mode="clip")
                known += entry_by_known_s[left:right]
                np.minimum.at(costs, targets[left:right], known)
                np.minimum(costs, before, out=costs)
            block_s[changed[since : until[row]]] = changed_s[since : until[row]]
            since = until[row]
            costs += block_s
        return reached

    def _cheapest_source(self, reached: Costs, target: int) -> int:
        """From where a server is best entered behind a block, with what it costs to have ``reached`` that."""
        by_client_s = reached + self._client_s
        source = int(by_client_s.argmin())
        before, after, delay_s = self._known
        to_target = np.flatnonzero(after == target)
        if len(to_target):
            known_s = reached[before[to_target]] + delay_s[to_target]
            best = int(known_s.argmin())
            if known_s[best] < by_client_s[source] + self._client_s[target]:
                return int(before[to_target[best]])
        return source


def _switches(first: Indices, last: Indices, sources: Indices, targets: Indices) -> tuple[Indices, Indices]:
    """First row at which a target may follow its source, each with one block at least, and one past the last [E]."""
    return np.maximum(first[sources] + 1, first[targets]), np.minimum(last[sources] + 1, last[targets])


def _order(rows: Indices, num_rows: int) -> tuple[Indices, list[int]]:
    """As ``np.argsort``, equals in their order; and how many are in each row and those before it [B].

    Small integers are sorted several times as fast, by their digits.
    """
    assert num_rows <= np.iinfo(np.int16).max
    order = np.argsort(rows.astype(np.int16), kind="stable")
    return order, np.searchsorted(rows[order], np.arange(num_rows), side="right").tolist()


def _known_pairs(peer_ids: Sequence[PeerId], next_delays: Sequence[NextDelays]) -> tuple[Indices, Indices, Costs]:
    """Sources, targets and delays of the pairs [E] of which the first has measured the delay to the second."""
    digests = np.frombuffer(b"".join([peer_id.digest for peer_id in peer_ids]), dtype=("<u8", 4))
    known = np.frombuffer(b"".join([each.packed for each in next_delays]), dtype=_RECORD)
    lengths = np.array([len(each.packed) for each in next_delays]) // _RECORD.itemsize
    before = np.repeat(np.arange(len(lengths)), lengths)
    # Digests are looked for by their first eight bytes: to make a server with those of another takes 2**64 tries.
    order = np.argsort(digests[:, 0], kind="stable")
    places = np.searchsorted(digests[order, 0], known["digest"][:, 0])
    after = order[np.minimum(places, len(order) - 1)]
    is_known = (digests[after] == known["digest"]).all(axis=1) & (before != after)
    return before[is_known], after[is_known], known["delay_s"][is_known]


def _is_one(gaps: list[tuple[int, int]]) -> bool:
    return len(gaps) == 1 and gaps[0][1] - gaps[0][0] == 1
