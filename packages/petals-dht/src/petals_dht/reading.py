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
_MAX_PAGES = 256
"""In one range, so that a node that goes on for ever is left at last."""


async def read_pages(
    protocol: DirectoryProtocol,
    key: bytes,
    holders: Mapping[bytes, Sequence[tuple[Contact, Found]]],
    collect: Callable[[Contact, bytes], None],
) -> None:
    """Read the rest of each distinct set of entries from the first of its holders that gives it.

    ``holders`` maps a set's digest to those that have it, with the first page of each; ``collect`` takes an
    entry as it came.
    """
    async with asyncio.TaskGroup() as group:
        for members in holders.values():
            group.create_task(_read_one_of(protocol, key, members, collect))


async def _read_one_of(
    protocol: DirectoryProtocol,
    key: bytes,
    members: Sequence[tuple[Contact, Found]],
    collect: Callable[[Contact, bytes], None],
) -> None:
    for contact, page in members:
        assert page.next is not None
        ranges = split_range(page.next, min(_MAX_RANGES, max(1, (page.total - len(page.entries)) // 4)))
        outcomes = await asyncio.gather(
            *(_read_range(protocol, key, contact, after, until, collect) for after, until in ranges)
        )
        if all(outcomes):
            return


async def _read_range(
    protocol: DirectoryProtocol,
    key: bytes,
    contact: Contact,
    after: bytes,
    until: bytes,
    collect: Callable[[Contact, bytes], None],
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
