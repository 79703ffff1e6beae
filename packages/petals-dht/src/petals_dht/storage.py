"""What a node keeps for others: signed announcements, merged, expiring and bounded.

A key holds slots. Under a key of a model there is one slot per peer, and the announcement that was issued later wins; a
server that has left says so with an announcement in state "offline", which stays until it expires so that no older one
comes back. Under the key of the list of models there is one slot per model (name, fingerprint and number of blocks)
with any server's announcement as proof; so nobody can replace the entry of another model.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.errors import InvalidAnnouncementError
from petals_core.limits import MIB
from petals_dht.contacts import MODELS_KEY, source_group
from petals_dht.messages import DIGEST_BYTES, SLOT_BYTES
from petals_dht.shards import keys_of
from petals_dht.verification import Verifier

FIRST_SLOT = bytes(SLOT_BYTES)
LAST_SLOT = b"\xff" * SLOT_BYTES
_NO_ROOM = "no room for more announcements from this address"
_FRAMING_BYTES = 3
"""What msgpack adds to an entry in a page."""
_MAX_DIGESTED = 64
"""Entries whose digest is made for a single page."""
_ENTRY_OVERHEAD_BYTES = 1024
"""What an entry takes in memory besides its encoded form, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageLimits:
    """Bounds of one node's storage."""

    max_entries_per_key: int = 1024
    max_entries_per_source: int = 128
    """Under one key; so many servers may share an address, and a flood stays small where there is room, too."""
    max_total_bytes: int = 64 * MIB


@dataclass(frozen=True, slots=True)
class Page:
    """Some entries of a key, in the order of their slots."""

    entries: tuple[bytes, ...]
    total: int
    """Live entries under the key."""
    digest: bytes
    """Of all live entries in the slots that were asked for, where these are few; else of all under the key."""
    next: bytes | None
    """The slot to go on behind; None if this was the last page."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A verified announcement and who is charged for it."""

    signed: SignedAnnouncement
    source: str

    @property
    def expires_at_s(self) -> float:
        return self.signed.announcement.expires_at_s

    @property
    def num_bytes(self) -> int:
        return len(self.signed.encoded) + _ENTRY_OVERHEAD_BYTES


@dataclass(slots=True)
class _Shelf:
    """The entries of one key."""

    slots: list[bytes] = field(default_factory=list)
    """Sorted."""
    entries: dict[bytes, Entry] = field(default_factory=dict)
    use: Counter[str] = field(default_factory=Counter)
    """Entries per source."""
    digest: bytes | None = None
    next_expiry_s: float = float("inf")


def slot_of(key: bytes, signed: SignedAnnouncement) -> bytes:
    """Which slot under ``key`` an announcement belongs into (32 bytes).

    Raises:
        InvalidAnnouncementError: it does not belong under this key.
    """
    announcement = signed.announcement
    if key == MODELS_KEY:
        if announcement.state == "offline":
            raise InvalidAnnouncementError("the list of models keeps no servers that are offline")
        return _model_slot(announcement)
    if key not in keys_of(announcement.fingerprint, signed.peer_id):
        raise InvalidAnnouncementError("the announcement belongs under another key")
    return signed.peer_id.digest


def _model_slot(announcement: Announcement) -> bytes:
    parts = (announcement.model_name.encode(), announcement.fingerprint.encode(), b"%d" % announcement.num_blocks)
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()


def wins(new: SignedAnnouncement, old: SignedAnnouncement) -> bool:
    """Whether ``new`` replaces ``old`` in a slot: the later one, and of two at once the same one everywhere."""
    return (new.announcement.issued_at_s, new.encoded) > (old.announcement.issued_at_s, old.encoded)


class Storage:
    """Announcements under keys. All times are Unix times in seconds, given by the caller."""

    def __init__(self, limits: StorageLimits | None = None, verifier: Verifier | None = None) -> None:
        self._limits = limits or StorageLimits()
        self._verifier = verifier or Verifier()
        self._shelves: dict[bytes, _Shelf] = {}
        self._places: dict[str, dict[tuple[bytes, bytes], None]] = {}
        """Per source the (key, slot) of its entries, the oldest first."""
        self.num_entries = 0
        self.total_bytes = 0

    def store(self, key: bytes, encoded: bytes, *, source_host: str, now_s: float) -> bool:
        """Keep an announcement from an untrusted peer; False if it, or a later one of its slot, was there already.

        Where there is no room, an entry gives way that came from the source with the most; if that is this one's own
        source, the newcomer is refused.

        Raises:
            InvalidAnnouncementError: it is malformed, oversized, forged, expired, under a wrong key, or has no room.
        """
        shelf = self._live_shelf(key, now_s)
        signed = self._verifier.decode(encoded, now_s=now_s)
        slot = slot_of(key, signed)
        old = shelf.entries.get(slot) if shelf is not None else None
        if old is not None and not wins(signed, old.signed):
            return False
        entry = Entry(signed, source_group(source_host))
        if old is not None:
            self._remove(key, slot)
        else:
            self._make_room(key, entry)
        self._insert(key, slot, entry)
        return True

    def later(self, key: bytes, encoded: bytes, *, now_s: float) -> bytes | None:
        """What is kept in the slot of an announcement instead of it; None if it is kept itself.

        Raises:
            InvalidAnnouncementError: it is not valid, or not for this key.
        """
        shelf = self._live_shelf(key, now_s)
        entry = None if shelf is None else shelf.entries.get(slot_of(key, self._verifier.decode(encoded, now_s=now_s)))
        return None if entry is None or entry.signed.encoded == encoded else entry.signed.encoded

    def count(self, key: bytes, *, now_s: float) -> int:
        """How many live entries a key has."""
        shelf = self._live_shelf(key, now_s)
        return 0 if shelf is None else len(shelf.slots)

    def announcements(self, key: bytes, *, now_s: float) -> list[SignedAnnouncement]:
        """All live entries of a key, those of servers that have left too."""
        shelf = self._live_shelf(key, now_s)
        return [shelf.entries[slot].signed for slot in shelf.slots] if shelf is not None else []

    def page(
        self,
        key: bytes,
        *,
        now_s: float,
        max_bytes: int,
        after: bytes = FIRST_SLOT,
        until: bytes = LAST_SLOT,
    ) -> Page:
        """The first entries in slots behind ``after`` and up to ``until`` whose sizes sum up to ``max_bytes``."""
        shelf = self._live_shelf(key, now_s)
        if shelf is None:
            return Page((), 0, digest_of(()), None)
        if shelf.digest is None:
            shelf.digest = digest_of(shelf.entries[slot].signed.encoded for slot in shelf.slots)
        first = bisect.bisect_right(shelf.slots, after)
        end = bisect.bisect_right(shelf.slots, until)
        digest = shelf.digest
        if len(shelf.slots) - (end - first) > 0 and end - first <= _MAX_DIGESTED:
            digest = digest_of(shelf.entries[slot].signed.encoded for slot in shelf.slots[first:end])
        entries: list[bytes] = []
        position = first
        while position < end:
            encoded = shelf.entries[shelf.slots[position]].signed.encoded
            max_bytes -= len(encoded) + _FRAMING_BYTES
            if max_bytes < 0:
                break
            entries.append(encoded)
            position += 1
        next_slot = None if position >= end else (shelf.slots[position - 1] if position > first else after)
        return Page(tuple(entries), len(shelf.slots), digest, next_slot)

    def sweep(self, *, now_s: float) -> None:
        """Drop everything that has expired."""
        for key, shelf in list(self._shelves.items()):
            self._expire(key, shelf, now_s)

    def _live_shelf(self, key: bytes, now_s: float) -> _Shelf | None:
        shelf = self._shelves.get(key)
        if shelf is not None:
            self._expire(key, shelf, now_s)
        return self._shelves.get(key)

    def _expire(self, key: bytes, shelf: _Shelf, now_s: float) -> None:
        if shelf.next_expiry_s > now_s:
            return
        for slot in [slot for slot, entry in shelf.entries.items() if entry.expires_at_s <= now_s]:
            self._remove(key, slot)
        shelf.next_expiry_s = min((entry.expires_at_s for entry in shelf.entries.values()), default=float("inf"))

    def _make_room(self, key: bytes, newcomer: Entry) -> None:
        shelf = self._shelves.get(key)
        if shelf is not None and shelf.use[newcomer.source] >= self._limits.max_entries_per_source:
            raise InvalidAnnouncementError(_NO_ROOM)
        if shelf is not None and len(shelf.slots) >= self._limits.max_entries_per_key:
            source = _who_gives_way(shelf.use, newcomer.source)
            slot = next(slot for slot, entry in shelf.entries.items() if entry.source == source)
            self._remove(key, slot)
        while self.total_bytes + newcomer.num_bytes > self._limits.max_total_bytes:
            use = Counter({source: len(places) for source, places in self._places.items()})
            self._remove(*next(iter(self._places[_who_gives_way(use, newcomer.source)])))

    def _insert(self, key: bytes, slot: bytes, entry: Entry) -> None:
        shelf = self._shelves.setdefault(key, _Shelf())
        bisect.insort(shelf.slots, slot)
        shelf.entries[slot] = entry
        shelf.use[entry.source] += 1
        shelf.digest = None
        shelf.next_expiry_s = min(shelf.next_expiry_s, entry.expires_at_s)
        self._places.setdefault(entry.source, {})[key, slot] = None
        self.num_entries += 1
        self.total_bytes += entry.num_bytes

    def _remove(self, key: bytes, slot: bytes) -> None:
        shelf = self._shelves[key]
        entry = shelf.entries.pop(slot)
        shelf.slots.pop(bisect.bisect_left(shelf.slots, slot))
        shelf.digest = None
        shelf.use -= Counter({entry.source: 1})
        if not shelf.slots:
            del self._shelves[key]
        self.num_entries -= 1
        self.total_bytes -= entry.num_bytes
        del self._places[entry.source][key, slot]
        if not self._places[entry.source]:
            del self._places[entry.source]


def _who_gives_way(use: Counter[str], newcomer: str) -> str:
    source, most = use.most_common(1)[0]
    if most <= use[newcomer]:
        raise InvalidAnnouncementError(_NO_ROOM)
    return source


def digest_of(entries: Iterable[bytes]) -> bytes:
    """What stands for entries in the order of their slots."""
    content = hashlib.sha256()
    for encoded in entries:
        content.update(len(encoded).to_bytes(4, "big") + encoded)
    return content.digest()[:DIGEST_BYTES]
