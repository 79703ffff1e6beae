"""What went wrong with which server lately, as a penalty that decays."""

from __future__ import annotations

from dataclasses import dataclass

from petals_core.errors import Disposition, PetalsError
from petals_core.identity import PeerId

PENALTY_S = 20.0
"""Cost of a hop right after a first failure: more than any detour, less than having no chain at all."""
MAX_PENALTY_S = 600.0
HALF_LIFE_S = 60.0
_FORGET_BELOW_S = 0.01
_MAX_PEERS = 4096


@dataclass(slots=True)
class _Record:
    penalty_s: float
    at_s: float


class HealthLedger:
    """Penalties of servers in seconds of cost: a failure counts at once, doubles when repeated, halves every minute.

    ``now_s`` is a monotonic time.
    """

    def __init__(self) -> None:
        self._records: dict[PeerId, _Record] = {}

    def record_failure(self, peer_id: PeerId, error: PetalsError, *, now_s: float) -> None:
        """Note that a request to a server failed. Errors that are the request's own fault blame nobody."""
        match error.disposition:
            case Disposition.GIVE_UP:
                return
            case Disposition.RETRY_SAME:
                # Full, not faulty: worth its waiting time.
                added_s = min(max(error.retry_after_s or 1.0, 0.1), PENALTY_S)
            case Disposition.GO_ELSEWHERE:
                added_s = PENALTY_S + self.penalty_s(peer_id, now_s=now_s)
        if len(self._records) >= _MAX_PEERS and peer_id not in self._records:
            oldest = min(self._records, key=lambda peer: self._records[peer].at_s)
            del self._records[oldest]
        penalty_s = min(self.penalty_s(peer_id, now_s=now_s) + added_s, MAX_PENALTY_S)
        self._records[peer_id] = _Record(penalty_s, now_s)

    def record_success(self, peer_id: PeerId, *, now_s: float) -> None:
        """Note that a server answered: what it did before counts half from now on."""
        record = self._records.get(peer_id)
        if record is None:
            return
        penalty_s = self.penalty_s(peer_id, now_s=now_s) / 2
        if penalty_s < _FORGET_BELOW_S:
            del self._records[peer_id]
        else:
            self._records[peer_id] = _Record(penalty_s, now_s)

    def penalty_s(self, peer_id: PeerId, *, now_s: float) -> float:
        """Return the cost to add to a visit of this server."""
        record = self._records.get(peer_id)
        if record is None:
            return 0.0
        penalty_s = record.penalty_s * 0.5 ** (max(0.0, now_s - record.at_s) / HALF_LIFE_S)
        return penalty_s if penalty_s >= _FORGET_BELOW_S else 0.0
