"""What is kept of forward passes so that their backward need not compute them again: how much, whose, how long.

Any thread may use a store: graphs grow in the device's thread and are named, taken and forgotten in the event loop.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Final

from petals_core.identity import PeerId

MAX_GRAPHS_PER_PEER: Final = 1024
"""A graph of a single token is small, but not nothing."""


@dataclass(slots=True, kw_only=True, eq=False)
class Graph:
    """What one request's backward needs, opaque to the store."""

    peer_id: PeerId
    content: Any = None
    num_bytes: int = 0
    """What the store has set aside for it."""
    expires_at_s: float | None = None
    """None: not complete yet."""
    is_dropped: bool = field(default=False)


class GraphStore:
    """Graphs of all peers within one budget of memory.

    Where there is no room, the oldest graph of the peer that has the most gives way, so that nobody is crowded out.
    """

    def __init__(self, *, budget_bytes: int, lifetime_s: float) -> None:
        self.budget_bytes = budget_bytes
        self.lifetime_s = lifetime_s
        self.num_bytes = 0
        """Set aside for all graphs, complete or not."""
        self._lock = threading.Lock()
        self._kept: dict[tuple[PeerId, bytes], Graph] = {}
        """Complete graphs, the oldest first."""
        self._per_peer: dict[PeerId, int] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def grow(self, graph: Graph, num_bytes: int) -> bool:
        """Set memory aside for a graph that is being made; False if there is no room even with others gone."""
        with self._lock:
            if graph.is_dropped:
                return False
            while self.num_bytes + num_bytes > self.budget_bytes:
                holdings = dict(self._per_peer)
                holdings[graph.peer_id] = holdings.get(graph.peer_id, 0) + num_bytes
                largest = max(holdings, key=holdings.__getitem__)
                victim = next((key for key in self._kept if key[0] == largest), None)
                if victim is None:
                    return False
                self._drop(self._kept.pop(victim))
            graph.num_bytes += num_bytes
            self._add(graph.peer_id, num_bytes)
            return True

    def keep(self, graph_id: bytes, graph: Graph, *, now_s: float) -> None:
        """Keep a complete graph under its peer's name for it, in the place of another of that name."""
        with self._lock:
            key = (graph.peer_id, graph_id)
            older = self._kept.pop(key, None)
            if older is None and sum(peer_id == graph.peer_id for peer_id, _ in self._kept) >= MAX_GRAPHS_PER_PEER:
                older = self._kept.pop(next(key for key in self._kept if key[0] == graph.peer_id))
            if older is not None:
                self._drop(older)
            graph.expires_at_s = now_s + self.lifetime_s
            self._kept[key] = graph

    def take(self, peer_id: PeerId, graph_id: bytes, *, now_s: float) -> Graph | None:
        """Hand out a graph, once; its memory counts until it is dropped."""
        with self._lock:
            graph = self._kept.pop((peer_id, graph_id), None)
            if graph is not None and graph.expires_at_s is not None and graph.expires_at_s <= now_s:
                self._drop(graph)
                return None
            return graph

    def drop(self, graph: Graph) -> None:
        """Forget a graph that was taken or never completed; idempotent."""
        with self._lock:
            self._drop(graph)

    def drop_expired(self, *, now_s: float) -> float | None:
        """Forget what is too old; returns when to do so again, None if nothing is kept."""
        with self._lock:
            for key, graph in list(self._kept.items()):
                assert graph.expires_at_s is not None
                if graph.expires_at_s > now_s:
                    return graph.expires_at_s
                self._drop(self._kept.pop(key))
            return None

    def _drop(self, graph: Graph) -> None:
        if not graph.is_dropped:
            graph.is_dropped = True
            graph.content = None
            self._add(graph.peer_id, -graph.num_bytes)

    def _add(self, peer_id: PeerId, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        held = self._per_peer.get(peer_id, 0) + num_bytes
        if held:
            self._per_peer[peer_id] = held
        else:
            self._per_peer.pop(peer_id, None)
