"""How fast a connection takes bytes, from the times in which it could not take more."""

from __future__ import annotations

from collections import deque
from typing import Final

_MEMORY: Final = 8
_LEAST_BYTES: Final = 32 * 1024
"""Of one measurement: less says more of the system's timing than of the link."""


class LinkRate:
    """The best of the last measurements: what disturbs one makes it too slow, and hardly ever too fast."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_MEMORY)

    def note(self, num_bytes: int, duration_s: float) -> None:
        """Take into account that so many bytes, which had to wait, were taken in this time."""
        if num_bytes >= _LEAST_BYTES and duration_s > 0:
            self._rates.append(num_bytes / duration_s)

    @property
    def bytes_per_s(self) -> float | None:
        """None: nothing had to wait so far, so nobody knows."""
        return max(self._rates, default=None)
