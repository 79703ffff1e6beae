"""Reading what several nodes keep under a key, page by page: everything that any of them has, most of it once."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from petals_dht.contacts import Contact
from petals_dht.messages import SLOT_BYTES, Find, Found
from petals_dht.storage import FIRST_SLOT, LAST_SLOT, digest_of

_RANGE_ENTRIES: Final = 16
_MAX_RANGES: Final = 64
_MAX_PAGES: Final = 2048
"""Of one holder, so that a node that goes on for ever is left at last: twice what it may keep."""
_COMPARED_AT_ONCE: Final = 4

Ask = Callable[[Contact, Find], Awaitable[Found | None]]
"""Sends a request; None if there is no answer."""
Collect = Callable[[Contact, bytes], bool]
"""Takes an entry as it came; tells whether it is good and new."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A node that keeps entries, by what it said first."""

    contact: Contact
    total: int
    digest: bytes
    """Of all that it keeps under the key."""


class Reader:
    """One reading of a key. Time is the event loop's.

    The slots are cut into ranges, and each is read from one holder, several at the same time; a holder that takes
    longer than ``patience_s`` is not waited for. Then those that keep something else, by their digests, are compared
    range by range. So what only one of them knows is found, and nobody's word counts: digests are compared with what
    came, not with what somebody else says he has.
    """

    def __init__(self, ask: Ask, key: bytes, holders: Sequence[Holder], collect: Collect, *, patience_s: float) -> None:
        sizes = Counter(holder.digest for holder in holders)
        self._ask = ask
        self._key = key
        self._holders = sorted(holders, key=lambda holder: -sizes[holder.digest])
        self._num_leading = max(sizes.values(), default=0)
        """So many of the first keep the same."""
        self._collect = collect
        self._patience_s = patience_s
        total = statistics.median_low([holder.total for holder in holders]) if holders else 0
        self._ranges = split_slots(min(_MAX_RANGES, 1 + total // _RANGE_ENTRIES))
        self._digests: list[set[bytes]] = [set() for _ in self._ranges]
        """Of each range, what was read."""
        self._num_pages: Counter[Contact] = Counter()
        self._progress_s = 0.0

    async def read(self) -> None:
        """Collect everything; ends when that is done, or nothing new comes any more."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        parts = await asyncio.gather(*(self._read_one_of(number) for number in range(len(self._ranges))))
        whole = None if None in parts else digest_of(itertools.chain.from_iterable(part or () for part in parts))
        others = [holder.contact for holder in self._holders if holder.digest != whole]
        if not others:
            return
        self._progress_s = loop.time()
        patience_s = self._patience_s + 2 * (self._progress_s - began_s)
        comparing = {asyncio.create_task(self._compare(contact)) for contact in others}
        waiting = set(comparing)
        try:
            while waiting:
                timeout_s = max(0.0, self._progress_s + patience_s - loop.time())
                done, waiting = await asyncio.wait(waiting, timeout=timeout_s)
                for task in done:
                    task.result()
                if loop.time() - self._progress_s >= patience_s:
                    return
        finally:
            await _end(comparing)

    async def _read_one_of(self, number: int) -> list[bytes] | None:
        """One range from the first holder that gives it, asking the next one whenever that takes long."""
        leading = self._holders[: self._num_leading]
        turn = number % len(leading) if leading else 0
        reading: set[asyncio.Task[list[bytes] | None]] = set()
        waiting = set(reading)
        try:
            for holder in (*leading[turn:], *leading[:turn], *self._holders[self._num_leading :], None):
                if holder is not None:
                    task = asyncio.create_task(self._read_range(holder.contact, number))
                    reading.add(task)
                    waiting.add(task)
                while waiting:
                    timeout_s = None if holder is None else self._patience_s
                    done, waiting = await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        entries = task.result()
                        if entries is not None:
                            return entries
                    if holder is not None:
                        break
            return None
        finally:
            await _end(reading)

    async def _compare(self, contact: Contact) -> None:
        """Read those ranges in which a holder has something else than others; ends if it does not answer."""
        room = asyncio.Semaphore(_COMPARED_AT_ONCE)
        is_there = True

        async def compare(number: int) -> None:
            nonlocal is_there
            async with room:
                if is_there and await self._read_range(contact, number) is None:
                    is_there = False

        await asyncio.gather(*(compare(number) for number in range(len(self._ranges))))

    async def _read_range(self, contact: Contact, number: int) -> list[bytes] | None:
        """The entries of a range, or as far as it is clear that they are known; None if the node gives nonsense."""
        after, until = self._ranges[number]
        entries: list[bytes] = []
        while self._num_pages[contact] < _MAX_PAGES:
            self._num_pages[contact] += 1
            page = await self._ask(contact, Find(key=self._key, after=after, until=until))
            if page is None:
                return None
            for encoded in page.entries:
                if self._collect(contact, encoded):
                    self._progress_s = asyncio.get_running_loop().time()
            if not entries and page.digest in self._digests[number]:
                return list(page.entries)
            entries += page.entries
            if page.next is None:
                self._digests[number].add(digest_of(entries))
                return entries
            if not page.entries or not after < page.next <= until:
                return None
            after = page.next
        return None


def split_slots(count: int) -> list[tuple[bytes, bytes]]:
    """Cut the slots into ``count`` ranges (behind, up to) that can be read at the same time."""
    first, last = int.from_bytes(FIRST_SLOT, "big"), int.from_bytes(LAST_SLOT, "big")
    bounds = [first + (last - first) * number // count for number in range(count + 1)]
    slots = [bound.to_bytes(SLOT_BYTES, "big") for bound in bounds]
    return list(itertools.pairwise(slots))


async def _end(tasks: set[asyncio.Task[None]] | set[asyncio.Task[list[bytes] | None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
