"""Which sessions a server has open, and whether there is room for another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from petals_core.errors import OverloadedError
from petals_core.identity import PeerId
from petals_server.config import ServerLimits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reservation:
    """A session's place in the table."""

    peer_id: PeerId
    num_tokens: int
    """Cache tokens set aside: for each row ``max_length``, and what its recurrent state takes."""


class SessionTable:
    """The open sessions and the budget of cache tokens that they share."""

    def __init__(self, *, cache_tokens: int, limits: ServerLimits, state_tokens: int = 0) -> None:
        """``state_tokens``: what a row takes beside its tokens, in units of these."""
        self.cache_tokens = cache_tokens
        self._state_tokens = state_tokens
        self.cache_tokens_left = cache_tokens
        self._limits = limits
        self._open: set[Reservation] = set()
        self._per_peer: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, peer_id: PeerId, *, num_rows: int, max_length: int) -> Reservation:
        """Set room aside for a session until it is closed.

        Raises:
            OverloadedError: there is no room now.
        """
        reservation = Reservation(peer_id=peer_id, num_tokens=num_rows * (max_length + self._state_tokens))
        retry_after_s = self._limits.retry_after_s
        if self._per_peer[peer_id] >= self._limits.max_sessions_per_peer:
            raise OverloadedError(
                f"you have {self._per_peer[peer_id]} sessions open here, which is the most: close one",
                retry_after_s=retry_after_s,
            )
        if len(self._open) >= self._limits.max_sessions:
            raise OverloadedError(
                f"{len(self._open)} sessions are open, which is the most", retry_after_s=retry_after_s
            )
        if reservation.num_tokens > self.cache_tokens_left:
            raise OverloadedError(
                f"the session needs {reservation.num_tokens} tokens of attention cache and {self.cache_tokens_left} of "
                f"{self.cache_tokens} are left: wait, or ask for a shorter max_length or fewer rows",
                retry_after_s=retry_after_s,
            )
        self._open.add(reservation)
        self._per_peer[peer_id] += 1
        self.cache_tokens_left -= reservation.num_tokens
        return reservation

    def close(self, reservation: Reservation) -> None:
        """Give a session's room back."""
        self._open.remove(reservation)
        self.cache_tokens_left += reservation.num_tokens
        self._per_peer[reservation.peer_id] -= 1
        if not self._per_peer[reservation.peer_id]:
            del self._per_peer[reservation.peer_id]
