"""Which node to ask next in a search for the nodes that are nearest to a key."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable

from petals_dht.contacts import Contact, distance


class Crawl:
    """The state of one search, without time or network.

    Unlike the crawls of the ``kademlia`` package it has no rounds, so a node that is slow or dead holds up nobody else,
    and it has a bound, so a liar who invents ever nearer nodes comes to an end.
    """

    def __init__(
        self,
        key: bytes,
        seeds: Iterable[Contact],
        *,
        own_id: bytes,
        width: int,
        parallelism: int = 5,
        max_asked: int = 300,
    ) -> None:
        """``width`` is Kademlia's k: the search ends when the nearest so many that may be alive have answered."""
        self._key = key
        self._own_id = own_id
        self._width = width
        self._parallelism = parallelism
        self._num_left = max_asked
        self._known: list[tuple[int, Contact]] = []
        """By distance, without those that failed."""
        self._seen: set[Contact] = set()
        """By id and address: a false address that somebody tells first must not hide the true one."""
        self._under_way: set[Contact] = set()
        self._stalled: set[Contact] = set()
        """Those under way that others are asked beside."""
        self._answered: set[Contact] = set()
        self._learn(seeds)

    def take(self) -> list[Contact]:
        """The contacts to ask now; each is to be reported by ``answered`` or ``failed``."""
        living = (contact for _, contact in self._known if contact not in self._stalled)
        nearest = list(itertools.islice(living, self._width))
        waiting = [contact for contact in nearest if not self._is_asked(contact)]
        # Once the nearest of all has answered, hardly anything nearer will be learnt: ask the rest all at once.
        has_converged = bool(nearest) and nearest[0] in self._answered
        room = self._width if has_converged else self._parallelism
        taken = waiting[: max(0, min(room - len(self._under_way - self._stalled), self._num_left))]
        self._num_left -= len(taken)
        self._under_way.update(taken)
        return taken

    def answered(self, contact: Contact, contacts: Iterable[Contact]) -> None:
        """``contact`` has answered with the contacts nearest to the key that it knows."""
        self._under_way.discard(contact)
        self._stalled.discard(contact)
        self._answered.add(contact)
        self._learn(contacts)

    def stalled(self, contact: Contact) -> None:
        """``contact`` takes long; it may answer yet, but its place is given to another one."""
        self._stalled.add(contact)

    def failed(self, contact: Contact) -> None:
        """``contact`` has not answered."""
        self._under_way.discard(contact)
        self._stalled.discard(contact)
        self._known.remove((distance(contact.id, self._key), contact))

    @property
    def is_done(self) -> bool:
        """Nobody is left to be asked or waited for."""
        if self._under_way:
            return False
        return self._num_left <= 0 or all(self._is_asked(contact) for _, contact in self._known[: self._width])

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def nearest(self) -> list[Contact]:
        """Those that have answered, the nearest first, at most ``width``."""
        found = {contact.id: contact for _, contact in reversed(self._known) if contact in self._answered}
        return list(reversed(found.values()))[: self._width]

    def _is_asked(self, contact: Contact) -> bool:
        return contact in self._answered or contact in self._under_way

    def _learn(self, contacts: Iterable[Contact]) -> None:
        for contact in contacts:
            if contact not in self._seen and contact.id != self._own_id:
                self._seen.add(contact)
                bisect.insort(self._known, (distance(contact.id, self._key), contact), key=lambda item: item[0])
