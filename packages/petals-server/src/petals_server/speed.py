"""How fast a server is: what was measured at start, corrected by what is observed while it serves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

AVERAGING_S: Final = 60.0
"""Over about how long observations are averaged: a minute in which others use the machine shows, a moment does not."""
MAX_CORRECTION: Final = 100.0
"""Observations that differ from the measurement by more than this factor, either way, are taken to be no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second through the whole span."""

    decode_tokens_per_s: float
    """Of one session, token by token."""
    forward_tokens_per_s: float
    """Of many tokens at once."""


class Speedometer:
    """The speed that a server announces: an exponential average that begins with the measurement."""

    def __init__(self, measured: Speed, *, now_s: float) -> None:
        self._measured = measured
        self._speed = measured
        self._updated_s = now_s

    @property
    def speed(self) -> Speed:
        return self._speed

    def observe(self, observed: Speed, *, now_s: float) -> Speed:
        """Correct by what was observed up to now, in proportion to the time since the last correction.

        What is observed while nothing is asked for has to be what was observed last, so that idling changes nothing.
        """
        weight = -math.expm1(-max(0.0, now_s - self._updated_s) / AVERAGING_S)
        self._updated_s = max(now_s, self._updated_s)
        self._speed = Speed(
            decode_tokens_per_s=_corrected(
                self._speed.decode_tokens_per_s,
                observed.decode_tokens_per_s,
                self._measured.decode_tokens_per_s,
                weight,
            ),
            forward_tokens_per_s=_corrected(
                self._speed.forward_tokens_per_s,
                observed.forward_tokens_per_s,
                self._measured.forward_tokens_per_s,
                weight,
            ),
        )
        return self._speed


def _corrected(now: float, observed: float, measured: float, weight: float) -> float:
    """The geometric mean, because half and twice the speed are equally far away."""
    if not (now > 0 and observed > 0 and measured > 0):
        return now
    observed = min(max(observed, measured / MAX_CORRECTION), measured * MAX_CORRECTION)
    return math.exp((1 - weight) * math.log(now) + weight * math.log(observed))
