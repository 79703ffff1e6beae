"""Whether a connection had better send at the rate that arrives than by a window that losses and pauses make small."""

from __future__ import annotations

import math
from typing import Final

_ENOUGH: Final = 3
"""Packets: a single one may also have come late, and was sent again for nothing."""
_QUEUE: Final = 1.25
"""How many times the least round trip a round trip takes where a queue may have overflowed, as it does wherever senders
go on until it does."""
_FIRST_TRIP_BYTES: Final = 14_000
"""In the first round trip of a connection, and after each pause: ten segments (RFC 6928). Twice as much in the next."""
_LONG_S: Final = 0.1


class PacingChoice:
    """What the kernel knows of a connection, from time to time. Says no more than once that it is better paced.

    So it is for one of two reasons. Packets get lost on the way although nothing waits there, which is no sign of
    sending too fast. Or the link holds so much that beginning slowly, after each pause anew, takes ``_LONG_S``.
    """

    def __init__(self) -> None:
        self._num_resent = 0
        self._num_lost = 0
        """Without a queue."""
        self._is_made = False

    def note(self, *, num_resent: int, rtt_s: float, least_rtt_s: float, bytes_per_s: float | None) -> bool:
        """Whether the connection is to be paced from now on.

        Args:
            num_resent: packets sent again so far.
            bytes_per_s: what the link takes; None: nobody knows yet.
        """
        new, self._num_resent = num_resent - self._num_resent, num_resent
        if rtt_s <= _QUEUE * least_rtt_s:
            self._num_lost += new
        is_long = bytes_per_s is not None and beginning_s(bytes_per_s, least_rtt_s) >= _LONG_S
        if self._is_made or not (is_long or self._num_lost >= _ENOUGH):
            return False
        self._is_made = True
        return True


def beginning_s(bytes_per_s: float, rtt_s: float) -> float:
    """How long a connection takes until it fills its link."""
    return rtt_s * math.log2(max(1.0, bytes_per_s * rtt_s / _FIRST_TRIP_BYTES))
