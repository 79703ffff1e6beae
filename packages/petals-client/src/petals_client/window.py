"""How a long prompt is cut, and how many of its parts are under way at once."""

from __future__ import annotations

import math

MIN_PART_TOKENS = 32
MAX_PART_TOKENS = 512
_PARTS_PER_STAGE = 4
"""A part takes each stage in turn, and the first has to pass all before the last is busy: more parts make that less.
But on a CPU matrices of few rows are slow: 2,048 tokens of the bench model in parts of 32, 64, 128 and 256 take 1.43,
1.21, 1.05 and 1.00 times as long as in one piece."""
_MIN_PARTS_WITH_RAMPS = 6
"""Where fewer parts of the full size would do, these are small already."""
_MAX_IN_FLIGHT = 64
_FIRST_PARTS_PER_STAGE = 3
"""Until the first results say what the chain holds: one for each of its links and servers, and as many again for delays
and for connections that begin slowly. What is too much waits at the client and, within its credit, at the first server.
"""
_GAIN = 1.5
"""Above what just fills the chain, because trips and rates vary."""
_WEIGHT = 1 / 4


def choose_part_sizes(num_tokens: int, num_hops: int, *, max_tokens: int, part_tokens: int | None = None) -> list[int]:
    """Tokens of each part of a prompt; ``part_tokens`` asks for equal ones.

    The first are smaller, so that the servers behind the first begin early, and so are the last, so that little is left
    to do when the last token has been sent.
    """
    size = min(max_tokens, part_tokens or choose_part_tokens(num_tokens, num_hops))
    ramp = [size // 4, size // 2]
    if part_tokens is not None or ramp[0] < MIN_PART_TOKENS or num_tokens < _MIN_PARTS_WITH_RAMPS * size:
        ramp = []
    num_full, rest = divmod(num_tokens - 2 * sum(ramp), size)
    return ramp + [size] * num_full + ([rest] if rest else []) + ramp[::-1]


def choose_part_tokens(num_tokens: int, num_hops: int) -> int:
    """Tokens of the parts of a step: enough parts to keep all servers and links of a chain at work.

    One less than all only pays where it leaves several parts.
    """
    stages = num_hops + 1
    wanted = math.ceil(num_tokens / (_PARTS_PER_STAGE * stages))
    rounded = math.ceil(wanted / MIN_PART_TOKENS) * MIN_PART_TOKENS
    return min(MAX_PART_TOKENS, max(MIN_PART_TOKENS, rounded))


class FlightWindow:
    """Parts that may be under way: what the chain holds at its rate and delay, so that nothing waits in vain.

    The rate is that of the results; the delay the shortest trip that was seen.
    """

    def __init__(self, num_hops: int) -> None:
        self._floor = num_hops + 2
        self.limit = _FIRST_PARTS_PER_STAGE * (2 * num_hops + 1)
        self.num_in_flight = 0
        self._least_trip_s = math.inf
        self._interval_s: float | None = None
        self._last_s: float | None = None

    @property
    def has_room(self) -> bool:
        """Whether another part may be sent."""
        return self.num_in_flight < self.limit

    def sent(self) -> None:
        """A part was sent."""
        self.num_in_flight += 1

    def done(self, *, trip_s: float, now_s: float) -> None:
        """A part came back, ``trip_s`` after it was sent."""
        self.num_in_flight -= 1
        self._least_trip_s = min(self._least_trip_s, trip_s)
        if self._last_s is not None:
            interval_s = max(now_s - self._last_s, 1e-6)
            if self._interval_s is None:
                self._interval_s = interval_s
            self._interval_s += (interval_s - self._interval_s) * _WEIGHT
            full = self._least_trip_s / self._interval_s
            self.limit = min(_MAX_IN_FLIGHT, max(self._floor, math.ceil(_GAIN * full)))
        self._last_s = now_s
