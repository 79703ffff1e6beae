"""Whether packets get lost on the way although nothing waits there."""

from __future__ import annotations

from typing import Final

_ENOUGH: Final = 3
"""Packets: a single one may also have come late, and was sent again for nothing."""
_QUEUE: Final = 1.25
"""How many times the least round trip a round trip takes where a queue may have overflowed, as it does wherever senders
go on until it does."""


class Losses:
    """What the kernel has sent again, and how long round trips took then. Says no more than once that it is enough."""

    def __init__(self) -> None:
        self._num_resent = 0
        self._num_lost = 0
        """Without a queue."""

    def note(self, *, num_resent: int, rtt_s: float, least_rtt_s: float) -> bool:
        """Whether packets get lost that no queue had to drop; from numbers of the connection so far."""
        new, self._num_resent = num_resent - self._num_resent, num_resent
        if not new or rtt_s > _QUEUE * least_rtt_s or self._num_lost >= _ENOUGH:
            return False
        self._num_lost += new
        return self._num_lost >= _ENOUGH
