"""How long to wait before looking what has become of a step: what such steps have taken, and some more."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_WAIT_S = 2.0
"""Where nothing is known yet."""
MAX_WAIT_S = 10.0
_MARGIN_S = 0.2
"""What busy machines and networks add now and then."""
_MEAN_WEIGHT, _DEVIATION_WEIGHT, _DEVIATIONS = 1 / 8, 1 / 4, 4  # RFC 6298 section 2
_TOGETHER_S = 0.001
"""Parts that a server computes at once come back so soon after each other, which says nothing of how long to wait."""
PROBE_S = 2.0
_PROBE_ROUND_TRIPS = 4


@dataclass(slots=True)
class _Estimate:
    mean_s: float
    deviation_s: float


class Patience:
    """Durations of steps of one chain, by their kind: decoding, or parts of a prompt."""

    def __init__(self) -> None:
        self._known: dict[bool, _Estimate] = {}

    def note(self, duration_s: float, *, is_decode: bool) -> None:
        """Note what a step took, or the time between two parts of one."""
        if not is_decode and duration_s < _TOGETHER_S:
            return
        known = self._known.get(is_decode)
        if known is None:
            self._known[is_decode] = _Estimate(duration_s, duration_s / 2)
            return
        known.deviation_s += (abs(duration_s - known.mean_s) - known.deviation_s) * _DEVIATION_WEIGHT
        known.mean_s += (duration_s - known.mean_s) * _MEAN_WEIGHT

    def wait_s(self, *, is_decode: bool, num_looks: int = 0) -> float:
        """After how long without news to look again, when one has looked ``num_looks`` times in vain."""
        known = self._known.get(is_decode)
        first_s = FIRST_WAIT_S
        if known is not None:
            first_s = known.mean_s + max(_DEVIATIONS * known.deviation_s, known.mean_s, _MARGIN_S)
        return min(MAX_WAIT_S, first_s * 2**num_looks)

    @staticmethod
    def probe_s(round_trip_s: float) -> float:
        """How long a server that is alive may take to say so."""
        return PROBE_S + _PROBE_ROUND_TRIPS * round_trip_s
