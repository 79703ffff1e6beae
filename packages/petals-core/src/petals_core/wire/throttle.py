"""A limit on what is sent, shared by all connections."""

from __future__ import annotations

from typing import Final

_BURST_S: Final = 0.05
"""So much of a second may be sent at once after silence."""


class Throttle:
    """A token bucket that lends: what is written goes out in one piece, and then its sender waits until it is paid for.

    Everybody who shares it gets a turn in the order of asking, so one connection's bulk delays the decode steps of
    another by one write at most. ``now_s`` is a monotonic time.
    """

    def __init__(self, bytes_per_s: float) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"a limit of {bytes_per_s} bytes a second lets nothing through")
        self.bytes_per_s = bytes_per_s
        self._paid_until_s: float | None = None

    def spend(self, num_bytes: int, *, now_s: float) -> float:
        """Note what was written; returns for how long its sender is to wait before it writes again."""
        earliest_s = now_s - _BURST_S
        paid_until_s = earliest_s if self._paid_until_s is None else max(self._paid_until_s, earliest_s)
        self._paid_until_s = paid_until_s + num_bytes / self.bytes_per_s
        return max(0.0, self._paid_until_s - now_s)
