"""The open sessions of a server and their room in the attention cache, by the rules of ``admission.py``."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from petals_core.errors import CacheLostError, OverloadedError, PetalsError
from petals_core.identity import PeerId
from petals_server.admission import Account, Admission, Outcome, Verdict
from petals_server.config import ServerLimits

_ANSWERING_SHARE, _MAX_ANSWERING_S = 0.1, 1.0
"""Before its deadline a client that waits to begin is refused, so that it still learns when to come back."""
_COMPUTING_SHARE, _MAX_COMPUTING_S = 0.25, 10.0
"""The same for a step, which is to be computed in time when it has got its room."""


class Reservation:
    """A session's place in the table."""

    def __init__(self, account: Account, peer_id: PeerId) -> None:
        self.account = account
        self.peer_id = peer_id
        self.on_evicted: Callable[[], None] | None = None
        """Called when the session has to give its cache back; no step is under way then."""
        self._waiter: asyncio.Future[None] | None = None


class SessionTable:
    """Lets sessions begin and grow as there is room. Belongs to one event loop.

    Amounts are tokens of cache, rounded up to pages.
    """

    def __init__(
        self,
        *,
        cache_tokens: int,
        limits: ServerLimits,
        state_tokens: int = 0,
        page_tokens: int = 1,
        max_row_tokens: int | None = None,
    ) -> None:
        """
        Args:
            state_tokens: what a row takes beside its tokens, in units of these.
            max_row_tokens: what a row takes at most, however long it is, because blocks forget; None: no bound.
        """
        self.cache_tokens = cache_tokens
        self._state_tokens = state_tokens
        self._page_tokens = page_tokens
        self._max_row_tokens = max_row_tokens
        self._limits = limits
        self._admission = Admission(
            cache_tokens, max_sessions=limits.max_sessions, default_retry_s=limits.retry_after_s
        )
        self._open: dict[Account, Reservation] = {}
        self._per_peer: Counter[PeerId] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return self._admission.num_admitted

    @property
    def num_waiting(self) -> int:
        """Sessions that wait to begin."""
        return self._admission.num_waiting

    @property
    def num_evicted(self) -> int:
        """Sessions that had to give their cache back so that others could go on."""
        return self._admission.num_evicted

    @property
    def cache_tokens_left(self) -> int:
        """Tokens that no session holds or is promised."""
        return max(0, self.cache_tokens - self._admission.committed)

    @property
    def cache_tokens_held(self) -> int:
        """Tokens that sessions hold."""
        return self._admission.held

    def count_tokens(self, num_rows: int, num_columns: int) -> int:
        """What a session of so many rows takes while it has so many columns."""
        if self._max_row_tokens is not None:
            num_columns = min(num_columns, self._max_row_tokens)
        pages = -(-num_columns // self._page_tokens)
        return num_rows * (pages * self._page_tokens + self._state_tokens)

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def open(self, peer_id: PeerId, *, num_rows: int, max_length: int, deadline_s: float) -> Reservation:
        """Let a session begin as soon as there is room for it, until it is closed.

        ``deadline_s`` is on ``time.monotonic``'s clock. Cancellation leaves nothing behind.

        Raises:
            OverloadedError: there was no room before the deadline, or there can't be.
        """
        most = self.count_tokens(num_rows, max_length)
        if self._per_peer[peer_id] >= self._limits.max_sessions_per_peer:
            raise OverloadedError(
                f"you have {self._per_peer[peer_id]} sessions open here, which is the most: close one",
                retry_after_s=self._limits.retry_after_s,
            )
        if most > self.cache_tokens:
            raise OverloadedError(
                f"the session may need {most} tokens of attention cache and this server has {self.cache_tokens} for "
                "all: ask for a shorter max_length or fewer rows",
                retry_after_s=self._limits.retry_after_s,
            )
        now_s = time.monotonic()
        if self._admission.num_waiting >= self._limits.max_waiting_sessions:
            raise OverloadedError(
                f"{self._admission.num_waiting} sessions wait for room already: try again later",
                retry_after_s=self._admission.retry_after_s(most, now_s),
            )
        account = self._admission.enter(
            peer_id,
            most,
            now_s=now_s,
            deadline_s=deadline_s - min(_MAX_ANSWERING_S, _ANSWERING_SHARE * max(0.0, deadline_s - now_s)),
            num_fixed=num_rows * self._state_tokens,
        )
        reservation = self._open[account] = Reservation(account, peer_id)
        self._per_peer[peer_id] += 1
        try:
            await self._wait(reservation)
        except BaseException:
            self.close(reservation)
            raise
        return reservation

    async def grow(self, reservation: Reservation, num_tokens: int, *, deadline_s: float) -> None:
        """Have room for ``num_tokens`` in all, and keep it at least until :meth:`settle`.

        Raises:
            OverloadedError: there was no room before the deadline; the session is as it was.
            CacheLostError: the session had to give its cache back and is over.
        """
        account = reservation.account
        if account.is_over:
            raise _cache_lost()
        now_s = time.monotonic()
        deadline_s -= min(_MAX_COMPUTING_S, _COMPUTING_SHARE * max(0.0, deadline_s - now_s))
        if self._admission.grow(account, num_tokens, now_s=now_s, deadline_s=deadline_s):
            return
        try:
            await self._wait(reservation)
        except BaseException:
            self._admission.stop_waiting(account)
            self._decide()
            raise

    def holds(self, reservation: Reservation, num_tokens: int) -> bool:
        """Whether a session that is not over holds so much already, so that a step needs neither this nor that."""
        return not reservation.account.is_over and num_tokens <= reservation.account.held

    def settle(self, reservation: Reservation, num_tokens: int | None = None) -> None:
        """The step that :meth:`grow` was for is over; the session holds ``num_tokens``, or what it was given."""
        account = reservation.account
        self._admission.settle(account, account.held if num_tokens is None else num_tokens)
        if self._admission.is_awaited:
            self._decide()

    def close(self, reservation: Reservation) -> None:
        """Give a session's room back; idempotent."""
        if self._open.pop(reservation.account, None) is None:
            return
        self._admission.leave(reservation.account, now_s=time.monotonic())
        self._per_peer[reservation.peer_id] -= 1
        if not self._per_peer[reservation.peer_id]:
            del self._per_peer[reservation.peer_id]
        self._decide()

    # --- deciding -----------------------------------------------------------------------------------------------------

    async def _wait(self, reservation: Reservation) -> None:
        waiter = reservation._waiter = asyncio.get_running_loop().create_future()
        self._decide()
        try:
            await waiter
        finally:
            reservation._waiter = None

    def _decide(self) -> None:
        """Tell all whose wait is over, and see that this happens again in time."""
        now_s = time.monotonic()
        for verdict in self._admission.decide(now_s):
            self._tell(verdict)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        next_s = self._admission.next_time_s(now_s)
        if next_s is not None:
            self._timer = asyncio.get_running_loop().call_later(next_s - now_s, self._decide)

    def _tell(self, verdict: Verdict) -> None:
        reservation = self._open[verdict.account]
        waiter = reservation._waiter
        if verdict.outcome is Outcome.EVICTED and reservation.on_evicted is not None:
            reservation.on_evicted()
        if waiter is None or waiter.done():
            return
        if verdict.outcome in (Outcome.ADMITTED, Outcome.GROWN):
            waiter.set_result(None)
        elif verdict.outcome is Outcome.EVICTED:
            waiter.set_exception(_cache_lost())
        else:
            waiter.set_exception(self._refusal(verdict))

    def _refusal(self, verdict: Verdict) -> PetalsError:
        left = self.cache_tokens - self._admission.held
        what = "the step needs" if verdict.account.is_admitted else "to begin, the session needs"
        return OverloadedError(
            f"{what} {verdict.num_tokens} tokens of attention cache, and {left} of {self.cache_tokens} are free: "
            f"try again in {verdict.retry_after_s:.1f} s",
            retry_after_s=verdict.retry_after_s,
        )


def _cache_lost() -> CacheLostError:
    return CacheLostError("the session's cache had to make room for older sessions: open it again")
