"""Signs of life of a peer, and how often it may ask for work that costs it nothing."""

from __future__ import annotations

from typing import Final

from petals_core.errors import ProtocolError

MAX_PINGS_UNDER_WAY: Final = 8


class Keepalive:
    """Tells when to ping a silent peer and when to take it for dead."""

    def __init__(self, *, ping_interval_s: float, idle_timeout_s: float, now: float) -> None:
        self._ping_interval_s = ping_interval_s
        self._idle_timeout_s = idle_timeout_s
        self._heard_at = now
        self._pinged_at = now
        self._next_number = 0
        self._sent_at: dict[int, float] = {}

    def heard(self, now: float) -> None:
        """Note that something arrived."""
        self._heard_at = now

    def ping(self, now: float) -> int | None:
        """Return the number of a new ping to send; None when enough are under way."""
        self._pinged_at = now
        if len(self._sent_at) == MAX_PINGS_UNDER_WAY:
            return None
        self._next_number += 1
        self._sent_at[self._next_number] = now
        return self._next_number

    def pong(self, number: int, now: float) -> float:
        """Return the round trip in seconds of a ping that came back.

        Raises:
            ProtocolError: there was no such ping.
        """
        sent_at = self._sent_at.pop(number, None)
        if sent_at is None:
            raise ProtocolError("PONG frame without a ping")
        return now - sent_at

    def next_wakeup(self) -> float:
        """When ``is_dead`` or ``wants_ping`` may change."""
        ping_at = max(self._heard_at, self._pinged_at) + self._ping_interval_s
        return min(ping_at, self._heard_at + self._idle_timeout_s)

    def wants_ping(self, now: float) -> bool:
        """Whether the peer has been silent, and was not pinged, for the interval."""
        return now >= max(self._heard_at, self._pinged_at) + self._ping_interval_s

    def is_dead(self, now: float) -> bool:
        """Whether the peer has been silent for too long."""
        return now >= self._heard_at + self._idle_timeout_s


class Allowance:
    """Things that a peer may do ``burst`` times at once and ``rate_per_s`` times a second in the long run."""

    __slots__ = ("_burst", "_left", "_rate_per_s", "_since")

    def __init__(self, *, burst: int, rate_per_s: float, now: float) -> None:
        self._burst = burst
        self._rate_per_s = rate_per_s
        self._left = float(burst)
        self._since = now

    def take(self, now: float) -> bool:
        """Whether the peer may do it once more."""
        self._left = min(float(self._burst), self._left + (now - self._since) * self._rate_per_s)
        self._since = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
