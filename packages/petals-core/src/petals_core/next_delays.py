"""Delays from one server to few others, as it announces them and as plans read them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Self

_RECORD: Final = struct.Struct("<32sd")


@dataclass(frozen=True, slots=True)
class NextDelays:
    """Pairs (digest of a peer id, one-way delay in seconds), in the order in which they were given.

    They are packed, since a plan reads those of all servers of a swarm: as objects of their own they would lie all over
    the memory, and looking at them would take longer than planning.
    """

    packed: bytes = b""
    """32 bytes and a little-endian double for each pair."""

    @classmethod
    def of(cls, pairs: Iterable[tuple[bytes, float]]) -> Self:
        """Pack pairs; digests have 32 bytes."""
        return cls(b"".join(_RECORD.pack(digest, delay_s) for digest, delay_s in pairs))

    def get(self, digest: bytes) -> float | None:
        """The delay to a peer, the first one if there are several; None: there is none."""
        place = self.packed.find(digest)
        while place > 0 and place % _RECORD.size:  # as parts of two records
            place = self.packed.find(digest, place + 1)
        return None if place < 0 else _RECORD.unpack_from(self.packed, place)[1]

    def __len__(self) -> int:
        return len(self.packed) // _RECORD.size

    def __iter__(self) -> Iterator[tuple[bytes, float]]:
        yield from _RECORD.iter_unpack(self.packed)
