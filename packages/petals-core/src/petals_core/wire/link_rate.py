"""How fast a connection takes bytes, from the times in which it could not take more."""

from __future__ import annotations

from collections import deque
from typing import Final

_MEMORY: Final = 8
_LEAST_BYTES: Final = 32 * 1024
"""Of one measurement: less says more of the system's timing than of the link."""


class LinkRate:
    """The last measurements together: what is confirmed in bursts makes one too slow and another too fast."""

    def __init__(self) -> None:
        self._measured: deque[tuple[int, float]] = deque(maxlen=_MEMORY)

    def note(self, num_bytes: int, duration_s: float) -> None:
        """Take into account that so many bytes, arrived in this time, and that more had to wait."""
        if num_bytes >= _LEAST_BYTES and duration_s > 0:
            self._measured.append((num_bytes, duration_s))

    @property
    def bytes_per_s(self) -> float | None:
        """None: nothing had to wait so far, so nobody knows."""
        if not self._measured:
            return None
        return sum(num_bytes for num_bytes, _ in self._measured) / sum(duration_s for _, duration_s in self._measured)
