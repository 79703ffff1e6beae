"""What turns take, learnt from those that were.

It says two things. Who is worth waiting for: a session that decodes comes back soon after each reply, and a turn that
begins a moment earlier runs without it, so that sessions which could share turns would take turns. And how much bulk
may ride beside decoding sessions: a prompt that is cut into large chunks holds up everybody who decodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Final

MAX_WAIT_SHARE: Final = 0.2
"""Of the last turn's time: how long the device may wait for sessions that usually come back at once."""
MAX_WAIT_S: Final = 0.02
BULK_SHARE: Final = 1.0
"""Time that bulk work may add to a turn of decoding sessions, in units of such a turn without it."""
MIN_BULK_TOKENS: Final = 16
"""A prompt goes on by so many tokens in any turn that it is in."""
_DECODING_S: Final = 1.0
"""A session whose last step is no longer ago counts as decoding."""
_WEIGHT: Final = 0.3
"""Of the newest observation in each average."""


@dataclass(slots=True)
class _Habit:
    """How a session comes and goes."""

    done_s: float
    turnaround_s: float | None = None
    """From a reply to the next step; None: not known yet."""


class Pace:
    """Averages of what was observed. Time is an argument throughout."""

    def __init__(self, *, decode_tokens_per_s: float, bulk_tokens_per_s: float, max_turn_tokens: int) -> None:
        self._max_turn_tokens = max_turn_tokens
        self._bulk_token_s = 1 / max(1e-6, bulk_tokens_per_s)
        self._decode_s: dict[int, float] = {0: 1 / max(1e-6, decode_tokens_per_s)}
        """Seconds of turns of 2 ** key sessions that decode, and nothing else."""
        self._last_turn_s = 0.0
        self._last_num_decode = 1
        self._last_decode_s = float("-inf")
        self._habits: dict[object, _Habit] = {}
        self._returning: set[object] = set()
        """Those of the last turn with decode steps that have not come back."""

    def note_arrival(self, session: object, now_s: float) -> None:
        """A session's next step is here."""
        habit = self._habits.get(session)
        if habit is not None:
            took_s = now_s - habit.done_s
            habit.turnaround_s = _average(habit.turnaround_s, took_s)
        self._returning.discard(session)

    def note_turn(
        self, *, num_decode: int, num_bulk: int, seconds: float, decoded: Iterable[object], now_s: float
    ) -> None:
        """A turn is over that computed so many tokens of decode steps and others; ``decoded``: sessions whose step is
        done."""
        self._last_turn_s = seconds
        if num_decode:
            self._last_num_decode = num_decode
            self._last_decode_s = now_s
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
        most_s = min(MAX_WAIT_S, MAX_WAIT_SHARE * self._last_turn_s)
        latest = now_s
        for session in self._returning:
            if session in present:
                continue
            habit = self._habits[session]
            usual_s = habit.turnaround_s
            if usual_s is not None and usual_s > most_s:
                continue
            latest = max(latest, habit.done_s + (most_s if usual_s is None else min(most_s, 2 * usual_s + 5e-4)))
        return latest if latest > now_s else None

    def bulk_tokens(self, num_decode: int, now_s: float) -> int:
        """How many tokens of other requests may be in a turn with so many of decode steps."""
        if num_decode:
            allowed_s = BULK_SHARE * self.decode_turn_s(num_decode)
        elif now_s - self._last_decode_s < _DECODING_S:  # who decodes will be back before such a turn is over
            allowed_s = BULK_SHARE * self.decode_turn_s(self._last_num_decode)
        else:
            return self._max_turn_tokens
        return max(MIN_BULK_TOKENS, min(self._max_turn_tokens, int(allowed_s / self._bulk_token_s)))


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else (1 - _WEIGHT) * before + _WEIGHT * newest
