"""Having an announcement kept by the nodes nearest to its key."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import InvalidAnnouncementError, NoPeersError
from petals_dht.contacts import Contact, distance
from petals_dht.messages import Store, Stored
from petals_dht.protocol import DirectoryProtocol
from petals_dht.search import Place, Search
from petals_dht.shards import is_crowded
from petals_dht.storage import Storage, slot_of
from petals_dht.verification import Verifier

_PLACES_S: Final = 240.0
"""How long nodes nearest to a key are offered announcements without a new search: less than their tokens hold."""
_MAX_PLACES: Final = 32
_ENOUGH_PLACES: Final = 0.75
"""A smaller part of them that keeps an announcement calls for a new search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What came of offering an announcement."""

    num_nodes: int
    """So many keep it, or a later one of its slot."""
    later: SignedAnnouncement | None
    """The latest one that is kept in its place; None if it is the latest."""
    total: int
    """How many announcements the nodes keep under the key: the median of what they say."""


class Offering:
    """Offers announcements to other nodes, and keeps them here where this node is near enough itself."""

    def __init__(
        self,
        protocol: DirectoryProtocol,
        search: Search,
        storage: Storage,
        verifier: Verifier,
        *,
        width: int,
        is_first: bool,
        clock: Callable[[], float],
    ) -> None:
        """``is_first``: whether there may be no other node."""
        self._protocol = protocol
        self._search = search
        self._storage = storage
        self._verifier = verifier
        self._width = width
        self._is_first = is_first
        self._clock = clock
        self._places: dict[bytes, tuple[list[Place], float]] = {}
        """Per key the nodes that announcements were offered to, and when they were found, by loop time."""

    async def offer(self, key: bytes, encoded: bytes, *, timeout_s: float) -> Kept:
        """Keep an announcement at the nodes nearest to ``key``, this one included.

        Nodes that were found a few minutes ago are not searched for again as long as most of them keep it. Nobody gets
        it later because others are slow or dead. Where a key is crowded, nobody may have room for it.

        Raises:
            InvalidAnnouncementError: it is not valid (any more), or not for this key.
            NoPeersError: no other node keeps it, though there should be some.
        """
        signed = self._verifier.decode(encoded, now_s=self._clock())
        slot_of(key, signed)
        outcomes: list[Stored | None] = []
        """Of each other node what it said; None for no answer."""
        is_kept_here = False

        async def store_at(contact: Contact, token: bytes) -> None:
            answer = await self._protocol.call_contact(contact, Store(key=key, token=token, entry=encoded))
            response = None if answer is None else answer.response
            outcomes.append(response if isinstance(response, Stored) else None)

        def store_here(nearest: Sequence[Place]) -> None:
            nonlocal is_kept_here
            if not self._protocol.is_client and self._is_near(key, nearest):
                is_kept_here = self._store_here(key, encoded)

        async def search_and_store() -> None:
            storing: dict[Contact, asyncio.Task[None]] = {}

            def store_at_all(nearest: Sequence[Place]) -> None:
                for contact, token in nearest:
                    if contact not in storing:
                        storing[contact] = asyncio.create_task(store_at(contact, token))

            outcomes.clear()
            try:
                nearest = await self._search.nearest_nodes(key, on_lull=store_at_all)
                self._remember_places(key, nearest)
                store_here(nearest)
                store_at_all(nearest)
                await asyncio.gather(*storing.values())
            finally:
                for task in storing.values():
                    task.cancel()
                await asyncio.gather(*storing.values(), return_exceptions=True)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                known = self._known_places(key)
                if known is not None:
                    store_here(known)
                    await asyncio.gather(*(store_at(contact, token) for contact, token in known))
                if known is None or _num_knowing(outcomes) < _ENOUGH_PLACES * len(known):
                    await search_and_store()
        num_kept = sum(outcome is not None and outcome.is_kept for outcome in outcomes)
        total = _median_total(outcomes)
        if not num_kept and (not self._is_first or not is_kept_here) and not is_crowded(total):
            reasons = Counter("no answer" if outcome is None else outcome.reason for outcome in outcomes)
            why = reasons.most_common(1)[0][0] if reasons else "none answers; check the network connection"
            raise NoPeersError(f"no other node of the swarm keeps the announcement: {why}")
        return Kept(num_nodes=num_kept + is_kept_here, later=self._latest(signed, outcomes), total=total)

    def _store_here(self, key: bytes, encoded: bytes) -> bool:
        try:
            self._storage.store(key, encoded, source_host="127.0.0.1", now_s=self._clock())
        except InvalidAnnouncementError:  # no room: it is valid, as we know
            return False
        return True

    def _known_places(self, key: bytes) -> list[Place] | None:
        """The nodes nearest to ``key`` as they were found lately, with tokens that still hold; None if not known.

        In a swarm with few nodes every new one counts, so these are searched for each time.
        """
        nearest, found_at_s = self._places.get(key, ([], 0.0))
        is_fresh = asyncio.get_running_loop().time() - found_at_s < _PLACES_S
        return nearest if is_fresh and len(nearest) >= self._width else None

    def _remember_places(self, key: bytes, nearest: list[Place]) -> None:
        self._places.pop(key, None)
        self._places[key] = (nearest, asyncio.get_running_loop().time())
        while len(self._places) > _MAX_PLACES:
            del self._places[next(iter(self._places))]

    def _latest(self, offered: SignedAnnouncement, outcomes: Iterable[Stored | None]) -> SignedAnnouncement | None:
        """The latest of the announcements of the same peer and model that nodes keep instead of the one offered."""
        found: list[SignedAnnouncement] = []
        for outcome in outcomes:
            if outcome is not None and outcome.later is not None:
                with contextlib.suppress(InvalidAnnouncementError):
                    later = self._verifier.decode(outcome.later, now_s=self._clock())
                    ours = offered.announcement.fingerprint
                    if later.peer_id == offered.peer_id and later.announcement.fingerprint == ours:
                        found.append(later)  # anybody else's would have ours dated as late as he likes
        return max(found, key=lambda signed: signed.announcement.issued_at_s, default=None)

    def _is_near(self, key: bytes, nearest: Sequence[Place]) -> bool:
        """Whether this node is among the nearest to ``key`` itself."""
        if len(nearest) < self._width:
            return True
        return distance(self._protocol.own.id, key) < distance(nearest[-1][0].id, key)


def _num_knowing(outcomes: Iterable[Stored | None]) -> int:
    """Nodes that still are where announcements of the key belong, those that are full included."""
    return sum(outcome is not None and (outcome.is_kept or is_crowded(outcome.total)) for outcome in outcomes)


def _median_total(outcomes: Iterable[Stored | None]) -> int:
    totals = [outcome.total for outcome in outcomes if outcome is not None]
    return int(statistics.median_low(totals)) if totals else 0
