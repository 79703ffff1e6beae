"""How movers agree through the directory: an intent is announced, it settles, and then it holds or is given up.

An intent is part of a server's signed, expiring announcement, so nobody can announce one for another server. A server
reads the directory, announces its intent, waits ``SETTLE_S`` and reads again; all of that counts only if reading and
announcing took at most ``MAX_PROPOSAL_S``. Because the wait is not shorter than that, of two servers at least one sees
the other's intent in its last reading, and whoever sees none had announced before the other one looked first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from petals_server.placement.coverage import Coverage, Placed

SETTLE_S: Final = 6.0
MAX_PROPOSAL_S: Final = 6.0
REGION_BLOCKS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """A server's wish to hold ``start:end``, known to everybody."""

    peer_id: bytes
    start: int
    end: int
    issued_at_s: float
    """When the mover announced it; part of what is signed."""
    source: tuple[int, int] = (0, 0)
    """What it holds until then; nothing for a server that starts."""
    has_left: bool = False
    """It has settled, and the server is on the way."""

    @property
    def region(self) -> int:
        """The part of the model around the middle of the new span: one server at a time moves into it."""
        return (self.start + self.end) // 2 // REGION_BLOCKS

    def shares_blocks(self, other: Intent) -> bool:
        """Whether both would leave the same block."""
        return max(self.source[0], other.source[0]) < min(self.source[1], other.source[1])

    @property
    def precedence(self) -> bytes:
        """Of two intents for a region the one with the smaller value holds. It changes with every intent, so that no
        peer always wins."""
        return hashlib.sha256(self.peer_id + b"%d" % round(self.issued_at_s * 1000)).digest()


def may_propose(region: int, others: Iterable[Intent]) -> bool:
    """Whether nobody else is on the way into that region."""
    return all(other.region != region for other in others)


def holds(intent: Intent, others: Iterable[Intent]) -> bool:
    """Whether an intent that has settled goes before all its rivals: those for its region, or from its blocks."""
    for other in others:
        if other.peer_id == intent.peer_id:
            continue
        if other.has_left:
            if other.region == intent.region:
                return False
        elif (other.region == intent.region or intent.shares_blocks(other)) and other.precedence < intent.precedence:
            return False
    return True


def find_yielding(intent: Intent, others: Iterable[Intent], *, seen_before: Collection[bytes]) -> set[bytes]:
    """The rivals (by peer id) that are sure to stay if ``intent`` holds: they will see it and have to give way.

    ``seen_before`` are those whose intents were seen before ``intent`` was announced: they may have looked before that.
    """
    return {
        other.peer_id
        for other in others
        if not other.has_left
        and intent.shares_blocks(other)
        and intent.precedence < other.precedence
        and other.peer_id not in seen_before
    }


def may_leave(me: Placed, to: tuple[int, int], others: Coverage, *, min_witnesses: int, reloads: bool) -> bool:
    """Whether each block that ``me`` takes off is held by ``min_witnesses`` others that are steady.

    ``others`` counts as steady only servers that answered and have no intent of their own, or have to give way. With
    ``reloads`` the blocks that the mover will hold again need others too: they are away while it loads.
    """
    return all(
        others.holders[block] >= min_witnesses or (not reloads and to[0] <= block < to[1])
        for block in range(me.start, me.end)
    )
