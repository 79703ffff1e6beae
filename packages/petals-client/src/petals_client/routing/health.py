"""What went wrong with which server lately, as a penalty that decays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from petals_core.errors import Disposition, PetalsError
from petals_core.identity import PeerId

PENALTY_S: Final = 20.0
"""Cost of a hop right after a first failure: more than any detour, less than having no chain at all."""
MAX_PENALTY_S: Final = 600.0
HALF_LIFE_S: Final = 60.0
SLOW_FACTOR: Final = 3.0
"""An answer is slow if it took this many times as long as expected,"""
SLOW_S: Final = 0.25
"""and longer by this, so that a short stall counts for nothing."""
_FORGET_BELOW_S: Final = 0.01
_MAX_PEERS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is held against a server."""

    penalty_s: float
    """Cost of a visit, when it was noted."""
    at_s: float
    reason: str
    num_failures: int
    """One behind another; slow answers and full caches are none."""
    num_slow: int = 0
    """Slow answers one behind another."""


class HealthLedger:
    """Penalties of servers in seconds of cost. ``now_s`` is a monotonic time.

    A failure, a time-out included, counts at once; each further one without a success between doubles what there is,
    up to ten minutes; all of it halves every minute. A success clears it. Answers that come much later than expected
    count, from the second one behind another on, as many seconds as they were late, until one comes in time.
    """

    def __init__(self) -> None:
        self._records: dict[PeerId, Record] = {}

    def record_failure(self, peer_id: PeerId, error: PetalsError, *, now_s: float) -> None:
        """Note that a request to a server failed. Errors that are the request's own fault blame nobody."""
        penalty_s = self.penalty_s(peer_id, now_s=now_s)
        num_failures = self.num_failures(peer_id)
        match error.disposition:
            case Disposition.GIVE_UP:
                return
            case Disposition.RETRY_SAME:
                # Full, not faulty: worth its waiting time, however often it says so.
                penalty_s = max(penalty_s, min(max(error.retry_after_s or 1.0, 0.1), PENALTY_S))
            case Disposition.GO_ELSEWHERE:
                penalty_s = max(PENALTY_S, 2 * penalty_s) if num_failures else max(PENALTY_S, penalty_s)
                num_failures += 1
        self._note(peer_id, penalty_s, num_failures, error.message, now_s)

    def record_success(
        self, peer_id: PeerId, *, now_s: float, took_s: float | None = None, expected_s: float | None = None
    ) -> None:
        """Note that a server answered: what it did before is forgotten.

        With ``took_s`` and ``expected_s``, both of the same request, an answer that was slow is noted as such.
        """
        before = self._records.pop(peer_id, None)
        if took_s is None or expected_s is None:
            return
        late_s = took_s - expected_s
        if late_s > SLOW_S and took_s > SLOW_FACTOR * expected_s:
            num_slow = 1 if before is None else before.num_slow + 1
            text = f"an answer took {took_s:.2g} s instead of {expected_s:.2g} s"
            self._note(peer_id, min(late_s, PENALTY_S) if num_slow > 1 else 0.0, 0, text, now_s, num_slow=num_slow)

    def penalty_s(self, peer_id: PeerId, *, now_s: float) -> float:
        """Return the cost to add to a visit of this server."""
        record = self._records.get(peer_id)
        if record is None:
            return 0.0
        penalty_s = record.penalty_s * 0.5 ** (max(0.0, now_s - record.at_s) / HALF_LIFE_S)
        return penalty_s if penalty_s >= _FORGET_BELOW_S else 0.0

    def num_failures(self, peer_id: PeerId) -> int:
        """How often it failed without a success between."""
        record = self._records.get(peer_id)
        return 0 if record is None else record.num_failures

    def record(self, peer_id: PeerId) -> Record | None:
        """What was noted last."""
        return self._records.get(peer_id)

    def _note(
        self, peer_id: PeerId, penalty_s: float, num_failures: int, reason: str, now_s: float, *, num_slow: int = 0
    ) -> None:
        if len(self._records) >= _MAX_PEERS and peer_id not in self._records:
            oldest = min(self._records, key=lambda peer: self._records[peer].at_s)
            del self._records[oldest]
        self._records[peer_id] = Record(
            penalty_s=min(penalty_s, MAX_PENALTY_S),
            at_s=now_s,
            reason=reason,
            num_failures=num_failures,
            num_slow=num_slow,
        )
