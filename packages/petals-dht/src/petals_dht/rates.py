"""How much each source may ask for."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A token bucket: ``per_s`` on average, ``burst`` at once."""

    per_s: float
    burst: float


class RateLimiter:
    """One token bucket per source, for a bounded number of sources; the one unused for longest is forgotten first."""

    def __init__(self, rate: Rate, *, max_sources: int = 4096) -> None:
        self._rate = rate
        self._max_sources = max_sources
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admit(self, source: str, *, now_s: float, cost: float = 1.0) -> bool:
        """Take ``cost`` tokens of ``source``; False if it has not so many. ``now_s`` is monotonic time."""
        level, filled_at_s = self._levels.pop(source, (self._rate.burst, now_s))
        level = min(self._rate.burst, level + max(0.0, now_s - filled_at_s) * self._rate.per_s)
        is_admitted = level >= cost
        self._levels[source] = (level - cost if is_admitted else level, now_s)
        if len(self._levels) > self._max_sources:
            self._levels.popitem(last=False)
        return is_admitted
