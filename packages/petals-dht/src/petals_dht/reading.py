"""Reading what nodes keep under a key, page by page."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence

from petals_dht.contacts import Contact
from petals_dht.messages import SLOT_BYTES, Find, Found
from petals_dht.protocol import DirectoryProtocol
from petals_dht.storage import LAST_SLOT

_MAX_RANGES = 8
_MAX_PAGES = 64
"""In one range, so that a node that goes on for ever is left at last."""


async def read_pages(
    protocol: DirectoryProtocol,
    key: bytes,
    holders: Mapping[bytes, Sequence[tuple[Contact, Found]]],
    collect: Callable[[Contact, bytes], bool],
    *,
    patience_s: float,
) -> None:
    """Read the rest of each distinct set of entries from the first of its holders that gives it.

    ``holders`` maps a set's digest to those that have it, with the first page of each; ``collect`` takes an entry as it
    came and tells whether it is good and new. Once one set has been read, the others are given up when nothing new has
    come for ``patience_s``: so a node that answers slowly, or without end, holds up nobody.
    """
    loop = asyncio.get_running_loop()
    progress_at_s = loop.time()

    def collect_and_note(contact: Contact, encoded: bytes) -> bool:
        nonlocal progress_at_s
        is_new = collect(contact, encoded)
        if is_new:
            progress_at_s = loop.time()
        return is_new

    readers = {
        asyncio.create_task(_read_one_of(protocol, key, members, collect_and_note)) for members in holders.values()
    }
    waiting, has_read_one = set(readers), False
    try:
        while waiting:
            timeout_s = max(0.0, progress_at_s + patience_s - loop.time()) if has_read_one else None
            done, waiting = await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            has_read_one = has_read_one or any(task.result() for task in done)
            if not done and loop.time() - progress_at_s >= patience_s:
                return
    finally:
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read_one_of(
    protocol: DirectoryProtocol,
    key: bytes,
    members: Sequence[tuple[Contact, Found]],
    collect: Callable[[Contact, bytes], bool],
) -> bool:
    for contact, page in members:
        assert page.next is not None
        ranges = split_range(page.next, min(_MAX_RANGES, max(1, (page.total - len(page.entries)) // 4)))
        outcomes = await asyncio.gather(
            *(_read_range(protocol, key, contact, after, until, collect) for after, until in ranges)
        )
        if all(outcomes):
            return True
    return False


async def _read_range(
    protocol: DirectoryProtocol,
    key: bytes,
    contact: Contact,
    after: bytes,
    until: bytes,
    collect: Callable[[Contact, bytes], bool],
) -> bool:
    """Read the slots behind ``after`` up to ``until``; False if the node does not answer or gives nonsense."""
    for _ in range(_MAX_PAGES):
        answer = await protocol.call_contact(contact, Find(key=key, after=after, until=until))
        if answer is None or not isinstance(answer.response, Found):
            return False
        page = answer.response
        for encoded in page.entries:
            collect(contact, encoded)
        if page.next is None:
            return True
        if not page.entries or not after < page.next <= until:
            return False
        after = page.next
    return False


def split_range(after: bytes, count: int) -> list[tuple[bytes, bytes]]:
    """Cut the slots behind ``after`` into ``count`` ranges that can be read at the same time."""
    first, last = int.from_bytes(after, "big"), int.from_bytes(LAST_SLOT, "big")
    bounds = [first + (last - first) * number // count for number in range(count + 1)]
    slots = [bound.to_bytes(SLOT_BYTES, "big") for bound in bounds]
    return list(itertools.pairwise(slots))
