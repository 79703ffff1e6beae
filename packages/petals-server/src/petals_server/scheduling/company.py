"""Sessions that shared a turn and come to the next one together, as in a chain, where the server before has computed
them in one turn too.

Their states arrive one shortly after another. If the first one's turn began at once, the others would have to wait for
a turn of their own, at this server and at all behind it; so the device waits a moment, and they stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Final

_MAX_SKIPPED: Final = 64
"""Turns of a session that was waited for in vain again and again, until it is waited for once more."""


@dataclass(slots=True)
class _Member:
    """A session that decodes."""

    arrived_s: float
    others: set[object] = field(default_factory=set)
    """With which it shared its last turn, as far as they have not had another one since."""
    num_vain: int = 0
    """How often in a row others were computed without it."""
    num_skipped: int = 0
    """For how many turns it will not be waited for."""


class Company:
    """Who shared a turn with whom. Time is an argument throughout."""

    def __init__(self) -> None:
        self._members: dict[object, _Member] = {}

    def note_arrival(self, session: object, now_s: float) -> None:
        """A session's next step is here."""
        member = self._members.get(session)
        if member is None:
            self._members[session] = _Member(now_s)
        else:
            member.arrived_s = now_s

    def note_turn(self, decoded: Iterable[object]) -> None:
        """These sessions have shared a turn, and decode."""
        together = {session for session in decoded if session in self._members}
        for session in together:
            member = self._members[session]
            missing = member.others - together
            for other in missing:
                absent = self._members.get(other)
                if absent is not None and session in absent.others:
                    absent.others.discard(session)
                    if not absent.num_skipped:
                        absent.num_vain += 1
                        absent.num_skipped = min(_MAX_SKIPPED, 2**absent.num_vain)
            if member.num_skipped:
                member.num_skipped -= 1
            elif member.others and not missing:
                member.num_vain = 0
            member.others = together - {session}

    def forget(self, session: object) -> None:
        """A session is closed."""
        member = self._members.pop(session, None)
        for other in member.others if member is not None else ():
            if (still_there := self._members.get(other)) is not None:
                still_there.others.discard(session)

    def wait_until(self, present: Set[object], most_s: float) -> float | None:
        """Until when to wait for others of those that are here; None: there is nobody to wait for.

        ``most_s`` after the latest arrival, but no longer than twice that after the first.
        """
        arrived_s = [
            member.arrived_s
            for session in present
            if (member := self._members.get(session)) is not None and self._are_missing(member.others, present)
        ]
        return min(max(arrived_s) + most_s, min(arrived_s) + 2 * most_s) if arrived_s else None

    def _are_missing(self, others: Set[object], present: Set[object]) -> bool:
        return any(
            other not in present and (member := self._members.get(other)) is not None and not member.num_skipped
            for other in others
        )
