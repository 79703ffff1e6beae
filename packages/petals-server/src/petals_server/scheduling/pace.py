"""What turns take, learnt from those that were.

It says two things. Who is worth waiting for: a session that decodes comes back soon after each reply, and a turn that
begins a moment earlier runs without it, so that sessions which could share turns would take turns. And how much bulk
may ride beside decoding sessions: a prompt that is cut into large chunks holds up everybody who decodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Final

MAX_WAIT_SHARE: Final = 0.5
"""Of a lone session's turn: how long the device may wait for sessions that usually come back at once.

Who comes too late takes a turn of his own, and that takes hardly less time, so waiting costs half of what it may save.
"""
MAX_WAIT_S: Final = 0.02
BULK_SHARE: Final = 1.0
"""Time that bulk work may add to a turn of decoding sessions, in units of such a turn without it."""
MIN_BULK_TOKENS: Final = 4
"""A prompt goes on by so many tokens in any turn that it is in."""
_DECODING_S: Final = 1.0
"""A session whose last step is no longer ago counts as decoding."""
_WEIGHT: Final = 0.3
"""Of the newest observation in each average."""
_MAX_SKIPPED: Final = 64
"""Steps of a session that comes too late again and again, until it is waited for once more."""


@dataclass(slots=True)
class _Habit:
    """How a session comes and goes."""

    done_s: float
    num_late: int = 0
    """How often in a row the device has waited for it in vain."""
    num_skipped: int = 0
    """For how many steps it will not be waited for.

    What it takes while others' turns are computed says little, because then everything is slower: so it is tried again.
    """


class Pace:
    """Averages of what was observed. Time is an argument throughout."""

    def __init__(self, *, decode_tokens_per_s: float, bulk_tokens_per_s: float, max_turn_tokens: int) -> None:
        self._max_turn_tokens = max_turn_tokens
        self._bulk_token_s = 1 / max(1e-6, bulk_tokens_per_s)
        self._decode_s: dict[int, float] = {0: 1 / max(1e-6, decode_tokens_per_s)}
        """Seconds of turns of 2 ** key sessions that decode, and nothing else."""
        self._last_num_decode = 1
        self._habits: dict[object, _Habit] = {}
        self._returning: set[object] = set()
        """Those of the last turn with decode steps that have not come back."""

    def note_arrival(self, session: object, now_s: float) -> None:
        """A session's next step is here."""
        habit = self._habits.get(session)
        if habit is not None:
            if now_s - habit.done_s <= self._max_wait_s:
                habit.num_late = habit.num_skipped = 0
            elif habit.num_skipped:
                habit.num_skipped -= 1
            else:
                habit.num_late += 1
                habit.num_skipped = min(_MAX_SKIPPED, 2**habit.num_late)
        self._returning.discard(session)

    def note_turn(
        self, *, num_decode: int, num_bulk: int, seconds: float, decoded: Iterable[object], now_s: float
    ) -> None:
        """A turn is over that computed so many tokens of decode steps and others; ``decoded``: sessions whose step is
        done."""
        if num_decode:
            self._last_num_decode = num_decode
            if not num_bulk:
                key = num_decode.bit_length() - 1
                self._decode_s[key] = _average(self._decode_s.get(key), seconds)
        if num_bulk:
            spent_s = seconds - (self.decode_turn_s(num_decode) if num_decode else 0.0)
            self._bulk_token_s = _average(self._bulk_token_s, max(0.1 * seconds, spent_s) / num_bulk)
        decoded = list(decoded)
        if decoded:
            self._returning = set(decoded)
        for session in decoded:
            habit = self._habits.get(session)
            if habit is None:
                self._habits[session] = _Habit(now_s)
            else:
                habit.done_s = now_s

    def forget(self, session: object) -> None:
        """A session is closed."""
        self._habits.pop(session, None)
        self._returning.discard(session)

    def decode_turn_s(self, num_decode: int) -> float:
        """What a turn of so many decoding sessions and nothing else takes."""
        key = max(1, num_decode).bit_length() - 1
        known = self._decode_s.get(key)
        if known is not None:
            return known
        nearest = min(self._decode_s, key=lambda other: abs(other - key))
        return self._decode_s[nearest]

    def is_alone(self, session: object, now_s: float) -> bool:
        """Whether no other session decodes."""
        return all(other is session or now_s - habit.done_s > _DECODING_S for other, habit in self._habits.items())

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed of one session as observed, or as measured at start."""
        return 1 / self._decode_s[0]

    @property
    def bulk_tokens_per_s(self) -> float:
        """Speed with many tokens as observed, or as measured at start."""
        return 1 / self._bulk_token_s

    def wait_until(self, present: Set[object], now_s: float) -> float | None:
        """Until when the device should wait for sessions of the last turn; None: not at all."""
        latest = now_s
        for session in self._returning:
            if session not in present and not self._habits[session].num_skipped:
                latest = max(latest, self._habits[session].done_s + self._max_wait_s)
        return latest if latest > now_s else None

    @property
    def _max_wait_s(self) -> float:
        return min(MAX_WAIT_S, MAX_WAIT_SHARE * self._decode_s[0])

    def bulk_tokens(self, num_decode: int, now_s: float, present: Set[object] = frozenset()) -> int:
        """How many tokens of other requests may be in a turn with so many of decode steps.

        ``present`` are the sessions whose requests these are: nobody is held up by a prompt of his own.
        """
        if num_decode:
            allowed_s = BULK_SHARE * self.decode_turn_s(num_decode)
        elif any(now_s - habit.done_s < _DECODING_S and each not in present for each, habit in self._habits.items()):
            # Who decodes will be back before such a turn is over.
            allowed_s = BULK_SHARE * self.decode_turn_s(self._last_num_decode)
        else:
            return self._max_turn_tokens
        return max(MIN_BULK_TOKENS, min(self._max_turn_tokens, int(allowed_s / self._bulk_token_s)))


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else (1 - _WEIGHT) * before + _WEIGHT * newest
