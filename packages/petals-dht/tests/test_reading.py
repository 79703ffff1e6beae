from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.announcement import SignedAnnouncement
from petals_dht.contacts import Contact, model_key
from petals_dht.messages import Find, Found
from petals_dht.reading import Holder, Reader, split_slots
from petals_dht.storage import FIRST_SLOT, LAST_SLOT, Storage, StorageLimits
from petals_dht.testing import FINGERPRINT, make_announcement

NOW_S = 1_800_000_000.0
KEY = model_key(FINGERPRINT)
MANY = [make_announcement(now_s=NOW_S) for _ in range(120)]
PAGE_BYTES = 1000


class Nodes:
    """Nodes that keep something each; ``withholding`` ones claim what others have, and give nothing of it."""

    def __init__(self, kept: Sequence[Sequence[SignedAnnouncement]], *, withholding: int = 0, silent: int = 0) -> None:
        self.requests: Counter[Contact] = Counter()
        self.found: set[bytes] = set()
        self._storages: dict[Contact, Storage] = {}
        for number, announcements in enumerate(kept):
            storage = Storage(StorageLimits(max_entries_per_source=1024))
            for signed in announcements:
                storage.store(KEY, signed.encoded, source_host="192.0.2.1", now_s=NOW_S)
            self._storages[Contact(bytes([number]) * 20, "127.0.0.1", 1 + number)] = storage
        contacts = list(self._storages)
        self._withholding = set(contacts[:withholding])
        self._silent = set(contacts[withholding : withholding + silent])

    async def ask(self, contact: Contact, request: Find) -> Found | None:
        self.requests[contact] += 1
        await asyncio.sleep(0)
        if contact in self._silent:
            return None
        page = self._storages[contact].page(
            KEY, now_s=NOW_S, max_bytes=PAGE_BYTES, after=request.after or FIRST_SLOT, until=request.until or LAST_SLOT
        )
        is_honest = contact not in self._withholding
        return Found(
            token=bytes(8),
            entries=page.entries if is_honest else (),
            total=page.total,
            digest=page.digest,
            next=page.next if is_honest else None,
        )

    def collect(self, contact: Contact, encoded: bytes) -> bool:
        is_new = encoded not in self.found
        self.found.add(encoded)
        return is_new

    async def read(self) -> set[bytes]:
        holders = []
        for contact, storage in self._storages.items():
            page = storage.page(KEY, now_s=NOW_S, max_bytes=0)
            holders.append(Holder(contact, page.total, page.digest))
        await Reader(self.ask, KEY, holders, self.collect, patience_s=10.0).read()
        return self.found


def encoded(announcements: Sequence[SignedAnnouncement]) -> set[bytes]:
    return {signed.encoded for signed in announcements}


def test_what_all_keep_is_read_once() -> None:
    nodes = Nodes([MANY] * 5)
    assert asyncio.run(nodes.read()) == encoded(MANY)
    once = Nodes([MANY])
    asyncio.run(once.read())
    assert nodes.requests.total() == once.requests.total()
    assert len(nodes.requests) == 5, "each gives a part"
    assert max(nodes.requests.values()) < once.requests.total() / 2, "whose size is up to chance"


@settings(max_examples=25)
@given(st.lists(st.sets(st.integers(0, 119)), min_size=1, max_size=4))
def test_what_any_keeps_is_found(kept: list[set[int]]) -> None:
    nodes = Nodes([[MANY[number] for number in sorted(numbers)] for numbers in kept])
    assert asyncio.run(nodes.read()) == encoded([MANY[number] for number in set().union(*kept)])


def test_a_small_difference_costs_little() -> None:
    nodes = Nodes([MANY[1:], *[MANY] * 3])
    assert asyncio.run(nodes.read()) == encoded(MANY)
    same = Nodes([MANY] * 4)
    asyncio.run(same.read())
    assert nodes.requests.total() < 1.5 * same.requests.total()


@pytest.mark.parametrize("withholding", [1, 3])
def test_who_claims_to_have_what_others_have_hides_nothing(withholding: int) -> None:
    nodes = Nodes([MANY] * 4, withholding=withholding)
    assert asyncio.run(nodes.read()) == encoded(MANY)


def test_who_does_not_answer_is_not_asked_for_every_range() -> None:
    nodes = Nodes([MANY] * 4, silent=2)
    assert asyncio.run(nodes.read()) == encoded(MANY)


def test_a_node_that_goes_on_for_ever_is_left_at_last() -> None:
    class Endless(Nodes):
        async def ask(self, contact: Contact, request: Find) -> Found | None:
            self.requests[contact] += 1
            after = int.from_bytes(request.after or FIRST_SLOT, "big")
            return Found(
                token=bytes(8),
                entries=(b"x",),
                total=1 << 20,
                digest=bytes(8),
                next=(after + 1).to_bytes(32, "big"),
            )

    nodes = Endless([MANY[:1]])
    assert asyncio.run(nodes.read()) == {b"x"}
    assert nodes.requests.total() < 5000


@given(st.integers(1, 64))
def test_ranges_cover_all_slots(count: int) -> None:
    ranges = split_slots(count)
    assert len(ranges) == count
    assert ranges[0][0] == FIRST_SLOT
    assert ranges[-1][1] == LAST_SLOT
    assert all(until == after for (_, until), (after, _) in itertools.pairwise(ranges))
