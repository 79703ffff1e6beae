"""Who goes first on a server: all rules of priority are in this file.

- Between inference and training by seconds of the device, in shares of 8 to 1. Inference goes first as long as training
  is not behind its share: under steady load training still gets a ninth, and what one leaves unused the other gets.
- Within inference decode steps go before prompts, because somebody waits for each of them; how many tokens of prompts
  ride along in the same turn is decided with the turn.
- Within each of these, peers by tokens: all sessions and requests of a peer count together, so that a hundred sessions
  of one get what the only session of another gets. Within a peer the order is that of arrival.

Both are weighted fair queueing by start tags (Goyal, Vin and Cheng 1997): whoever has had least over its weight is
next, and who comes back from having nothing to do starts where the others are, so that idling saves up nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Final, Generic, Protocol, TypeVar

from petals_server.scheduling.request import Urgency

K = TypeVar("K", bound=Hashable)

_MAX_IDLE: Final = 1024
"""Peers without work whose last consumption is remembered."""


TIME_SHARES: Final = {False: 8.0, True: 1.0}
"""Of the device's time, by whether it is training, while both are asked for."""


class Request(Protocol):
    """What there is to know of waiting work."""

    @property
    def peer_id(self) -> Hashable:
        """Who asked for it; None: the server itself, which goes before all others."""

    @property
    def urgency(self) -> Urgency: ...

    @property
    def num_tokens_left(self) -> int:
        """Tokens that it still takes."""

    @property
    def arrived_s(self) -> float: ...


R = TypeVar("R", bound=Request)


class VirtualTimes(Generic[K]):
    """What each of several takers has had, over its weight."""

    def __init__(self, weight: Callable[[K], float]) -> None:
        self._weight = weight
        self._times: dict[K, float] = {}
        self._now = 0.0
        """The largest time at which anybody was served."""

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, key: K) -> float:
        return self._times.get(key, self._now)

    def after(self, key: K, time: float, amount: float) -> float:
        """Where ``amount`` brings a taker that is at ``time``."""
        return time + amount / self._weight(key)

    def activate(self, key: K) -> None:
        """It had nothing to do, and has now."""
        self._times[key] = max(self._now, self[key])

    def charge(self, key: K, amount: float) -> None:
        """It was its turn, and it has had ``amount``."""
        before = self[key]
        self._now = max(self._now, before)
        self._times[key] = self.after(key, before, amount)

    def retain(self, active: Collection[K]) -> None:
        """Forget takers that are not ``active`` and had no more than others; if there are very many, others too."""
        if len(self._times) <= 2 * len(active) + _MAX_IDLE:
            return
        idle = sorted((key for key in self._times if key not in active), key=self._times.__getitem__)
        num_kept = len(self._times) - len(idle)
        for key in idle:
            if self._times[key] > self._now and len(self._times) <= num_kept + _MAX_IDLE:
                break
            del self._times[key]


class Shares:
    """Orders waiting work, and counts what everybody has had."""

    def __init__(self, weight: Callable[[Hashable], float] = lambda peer_id: 1.0) -> None:
        """``weight`` of a peer: twice the weight is twice the share. It has to be positive."""
        self._peers: VirtualTimes[Hashable] = VirtualTimes(weight)
        self._kinds: VirtualTimes[bool] = VirtualTimes(TIME_SHARES.__getitem__)
        self._ordered_s = -math.inf
        """When work was ordered last: what had arrived by then and is here again has waited all along."""
        self._waited: set[bool] = set()

    def order(self, requests: Sequence[R], now_s: float) -> list[R]:
        """All requests that wait, who goes first at the head. To be called once for each turn."""
        waiting_peers = {request.peer_id for request in requests}
        have_waited = {request.peer_id for request in requests if request.arrived_s <= self._ordered_s}
        for peer_id in waiting_peers - have_waited:
            self._peers.activate(peer_id)
        self._peers.retain(waiting_peers)
        kinds = {request.urgency is Urgency.TRAINING for request in requests}
        for kind in kinds - self._waited:
            self._kinds.activate(kind)
        self._waited, self._ordered_s = kinds, now_s
        if len(requests) == 1:
            return list(requests)
        ordered: list[R] = []
        for is_training in sorted(kinds, key=lambda kind: (self._kinds[kind], kind)):
            for urgency in (Urgency.TRAINING,) if is_training else (Urgency.DECODE, Urgency.BULK):
                ordered += self._order_peers([request for request in requests if request.urgency is urgency])
        return ordered

    def _order_peers(self, requests: list[R]) -> list[R]:
        """Requests of one urgency, as if each were computed to its end when its turn comes."""
        own = [request for request in requests if request.peer_id is None]
        per_peer: dict[Hashable, list[R]] = {}
        for request in sorted(requests, key=lambda request: request.arrived_s, reverse=True):
            if request.peer_id is not None:
                per_peer.setdefault(request.peer_id, []).append(request)
        if len(per_peer) == 1:
            (only,) = per_peer.values()
            return [*own, *reversed(only)]
        heads = [
            (self._peers[peer_id], waiting[-1].arrived_s, number, peer_id)
            for number, (peer_id, waiting) in enumerate(per_peer.items())
        ]
        heapq.heapify(heads)
        ordered = own
        while heads:
            time, _, number, peer_id = heads[0]
            waiting = per_peer[peer_id]
            request = waiting.pop()
            ordered.append(request)
            if waiting:
                time = self._peers.after(peer_id, time, request.num_tokens_left)
                heapq.heapreplace(heads, (time, waiting[-1].arrived_s, number, peer_id))
            else:
                heapq.heappop(heads)
        return ordered

    def charge(self, request: Request, num_tokens: int) -> None:
        """So many tokens of a request are computed."""
        if request.peer_id is not None:
            self._peers.charge(request.peer_id, num_tokens)

    def charge_alone(self, peer_id: Hashable, num_tokens: int, seconds: float, *, now_s: float) -> None:
        """So many tokens of inference are computed that came, at ``now_s``, while nothing waited."""
        if peer_id is not None:
            self._peers.activate(peer_id)
            self._peers.charge(peer_id, num_tokens)
            self._peers.retain((peer_id,))
        if False not in self._waited:
            self._kinds.activate(False)
        self._waited, self._ordered_s = {False}, now_s
        self._kinds.charge(False, seconds)

    def charge_time(self, seconds: float, *, is_training: bool) -> None:
        """The device was busy for so long."""
        self._kinds.charge(is_training, seconds)
