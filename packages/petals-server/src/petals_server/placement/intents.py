"""How movers agree through the directory: an intent is announced, it settles, and then it holds or is given up.

An intent is part of a server's signed, expiring announcement, so nobody can announce one for another server. A server
reads the directory, announces its intent, waits ``SETTLE_S`` and reads again; all of that counts only if reading and
announcing took at most ``MAX_PROPOSAL_S``. Because the wait is not shorter than that, of two servers at least one sees
the other's intent in its last reading, and whoever sees none had announced before the other one looked first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from petals_server.placement.coverage import Coverage, Placed

SETTLE_S: Final = 4.0
MAX_PROPOSAL_S: Final = 4.0
REGION_BLOCKS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """A server's wish to hold ``start:end``, known to everybody."""

    peer_id: bytes
    start: int
    end: int
    issued_at_s: float
    """When the mover announced it; part of what is signed."""

    @property
    def region(self) -> int:
        """The part of the model around the middle of the new span: one server at a time moves into it."""
        return (self.start + self.end) // 2 // REGION_BLOCKS

    @property
    def precedence(self) -> bytes:
        """Of two intents for a region the one with the smaller value holds. It changes with every intent, so that no
        peer always wins."""
        return hashlib.sha256(self.peer_id + b"%d" % round(self.issued_at_s * 1000)).digest()


def may_propose(region: int, others: Iterable[Intent]) -> bool:
    """Whether nobody else is on the way into that region."""
    return all(other.region != region for other in others)


def holds(intent: Intent, others: Iterable[Intent]) -> bool:
    """Whether an intent that has settled goes before all others for its region."""
    return all(
        other.region != intent.region or intent.precedence < other.precedence
        for other in others
        if other.peer_id != intent.peer_id
    )


def may_leave(me: Placed, to: tuple[int, int], others: Coverage, *, min_witnesses: int, reloads: bool) -> bool:
    """Whether each block that ``me`` takes off is held by ``min_witnesses`` others that are steady.

    ``others`` counts as steady only servers that answered and have no intent of their own, whatever its precedence.
    With ``reloads`` the blocks that the mover will hold again need others too: they are away while it loads.
    """
    return all(
        others.holders[block] >= min_witnesses or (not reloads and to[0] <= block < to[1])
        for block in range(me.start, me.end)
    )
