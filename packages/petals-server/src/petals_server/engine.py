"""The one thread that owns the device: it decides what the next turn computes, computes it, and hands results back.

The event loop adds work to the scheduler under a lock and awaits a future. The device's thread takes a plan under the
same lock, computes it without, and hands what is complete to the event loop, which encodes and sends it while the
device is at its next turn. Nothing else touches the model or a cache while a turn is computed.

To wake a thread up costs as much as a few hundred lines of Python, so a session that is alone gets its next token
without: while the device's thread waits, the event loop computes a step that takes no longer than ``MAX_HERE_S``
itself, with the lock held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from petals_core.errors import DeadlineExceededError, DrainingError, OverloadedError, PetalsError, RemoteFailureError
from petals_server.cache.pages import CachePages
from petals_server.config import ServerLimits
from petals_server.scheduling.pace import Pace
from petals_server.scheduling.plan import Plan
from petals_server.scheduling.request import Request
from petals_server.scheduling.scheduler import Scheduler, Wait
from petals_server.scheduling.shares import Shares
from petals_server.work import Call, Work

T = TypeVar("T")
MAX_HERE_S: Final = 0.01
"""What a step may take, as observed, that the event loop computes itself: so long it does nothing else."""
log = logging.getLogger(__name__)


Ending = tuple[Request, Exception | None]
"""Work that is complete, or has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a turn."""

    is_complete: bool
    """Whether work that goes alone has its result."""
    failures: list[tuple[Request, Exception]]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there was no memory, of any device; torch's own for the CPU has no class."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


class Engine:
    """Runs work on the device, turn by turn. Belongs to the event loop that made it."""

    def __init__(self, limits: ServerLimits, *, weight: Callable[[Hashable], float] = lambda peer_id: 1.0) -> None:
        """``weight`` of a peer in the shares of the device; called in either thread."""
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        """Around everything that both threads touch: the scheduler, the pages, whether the engine is closed."""
        # In C, where a condition variable runs a page of Python on both sides, in the middle of each step.
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._is_listening = False
        """Whether the device's thread waits for the bell."""
        self._scheduler = Scheduler(
            Shares(weight), Pace(decode_tokens_per_s=1.0, bulk_tokens_per_s=1.0, max_turn_tokens=512)
        )
        self.pages: CachePages | None = None
        """The pages of sessions' caches, once there is a model. Numbers may be read at any time; changes go through
        sessions."""
        self.on_freed: Callable[[], None] | None = None
        """Called in the event loop after pages were given back."""
        self._num_pages_held = 0
        self._num_queued = 0
        self._num_queued_tokens = 0
        self._is_closed = False
        self._stopped = asyncio.Event()
        self._coder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="petals-codec")
        self._thread = threading.Thread(target=self._run, name="petals-device", daemon=True)
        self._thread.start()

    def adopt(self, pages: CachePages, pace: Pace) -> None:
        """Take up the pages and the measured speed of a model that is ready."""
        with self._lock:
            self.pages = pages
            self._scheduler.pace = pace

    @property
    def num_queued(self) -> int:
        """Work that waits or is under way."""
        return self._num_queued

    @property
    def pace(self) -> Pace:
        """What turns take, as observed."""
        return self._scheduler.pace

    async def compute(self, work: Work[T]) -> T:
        """Let the device do ``work``; a work item is used once.

        Cancellation drops it before its next turn.

        Raises:
            OverloadedError: too much waits already, or there is no memory for it.
            DeadlineExceededError: its turn did not come, or not often enough, before its deadline.
            DrainingError: the engine is closed.
            RemoteFailureError: computing failed in a way that nobody foresaw.
            PetalsError: whatever else the work raises.
        """
        if self._is_closed:
            raise DrainingError("the server is stopping")
        if self._num_queued_tokens + work.num_tokens > self._limits.max_queued_tokens and self._num_queued:
            raise OverloadedError(
                f"{self._num_queued_tokens} tokens wait to be computed already: try again later",
                retry_after_s=self._limits.retry_after_s,
            )
        self._num_queued += 1
        self._num_queued_tokens += work.num_tokens
        try:
            if work.is_heavy:
                await self._loop.run_in_executor(self._coder, work.prepare)
            else:
                work.prepare()
            with self._lock:
                if self._is_closed:
                    raise DrainingError("the server is stopping")
                now_s = time.monotonic()
                may_compute = work.is_quick and self._may_compute_here(work.session, now_s)
                self._scheduler.add(work, now_s)
                finished = self._turn_here(now_s) if may_compute else []
                if work in self._scheduler:
                    work.future = self._loop.create_future()
                    self._ring()
            if work.future is not None:
                await self._settled(work, work.future)
            else:
                self._note_pages()
                for _, error in finished:  # by a turn of this work alone
                    if error is not None:
                        raise error
            if work.is_heavy:
                return await self._loop.run_in_executor(self._coder, work.result)
            return work.result()
        finally:
            self._num_queued -= 1
            self._num_queued_tokens -= work.num_tokens

    async def _settled(self, work: Work[T], future: asyncio.Future[None]) -> None:
        """Wait until the device's thread has computed ``work``."""
        try:
            await future
        except asyncio.CancelledError:
            with self._lock:
                self._scheduler.remove(work)
            raise

    def compute_here(self, session: object, compute: Callable[[], T]) -> T | None:
        """Compute a session's next token now, in the event loop; None: somebody else wants the device, or may soon.

        ``compute`` runs alone on the device. ``note_here`` is to follow, where it can no longer delay the result.

        Raises:
            PetalsError: as ``compute``.
        """
        with self._lock:
            if self._is_closed or not self._may_compute_here(session, time.monotonic()):
                return None
            try:
                return compute()
            except Exception as error:
                raise self._explain(error, 1) from None

    def note_here(self, session: object, peer_id: Hashable, *, started_s: float, ended_s: float) -> None:
        """Note what ``compute_here`` has computed."""
        with self._lock:
            self._scheduler.note_alone(session, peer_id, started_s=started_s, ended_s=ended_s)

    def _may_compute_here(self, session: object, now_s: float) -> bool:
        """Whether nobody but a session wants the device now, or soon; with the lock held."""
        pace = self._scheduler.pace
        return (
            self._is_listening
            and not self._scheduler
            and pace.decode_turn_s(1) <= MAX_HERE_S
            and pace.is_alone(session, now_s)
        )

    def _turn_here(self, now_s: float) -> list[Ending]:
        """One turn in the event loop, with the lock held; returns what is complete or failed by it."""
        plan = self._scheduler.plan(now_s)
        finished = self._failed_to_begin()
        if isinstance(plan, Plan):
            finished += self._absorb(plan, self._compute(plan), now_s, time.monotonic())
        return finished

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the device's thread and return its result; what it raises is raised here."""
        return await self.compute(Call(function))

    def close_session(self, session: object, close: Callable[[], None]) -> None:
        """Let a session give its pages back, by ``close``, at once: what is computed for it still is for nobody."""
        with self._lock:
            self._scheduler.pace.forget(session)
            close()
            self._ring()
        self._note_pages()

    async def close(self) -> None:
        """Drop all work (its callers get ``DrainingError``), and end the thread after the turn under way."""
        if self._is_closed:
            return
        with self._lock:
            self._is_closed = True
            self._ring()
        await self._stopped.wait()
        self._thread.join()  # It has nothing left to do but to return.
        self._coder.shutdown(wait=False)

    def _ring(self) -> None:
        """Let the device's thread look again, if it waits; with the lock held."""
        if self._is_listening:
            self._is_listening = False
            self._bell.put(None)

    # --- in the device's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (plan := self._decide()) is not None:
            started_s = time.monotonic()
            outcome = self._compute(plan)
            with self._lock:
                finished = self._absorb(plan, outcome, started_s, time.monotonic())
            self._hand_back(finished)
            del plan, outcome, finished  # An idle engine must not keep the last request's tensors.
        with contextlib.suppress(RuntimeError):  # The loop may be closed, then nobody waits.
            self._loop.call_soon_threadsafe(self._stopped.set)

    def _decide(self) -> Plan | None:
        """Wait for something to compute; None when the engine is closed."""
        while True:
            with self._lock:
                self._is_listening = False
                if self._is_closed:
                    self._hand_back(
                        [(work, DrainingError("the server is stopping")) for work in self._scheduler.requests]
                    )
                    return None
                now_s = time.monotonic()
                next_s = self._drop_late(now_s)
                plan = self._scheduler.plan(now_s)
                if failures := self._failed_to_begin():
                    self._hand_back(failures)
                    if isinstance(plan, Wait):
                        continue
                if isinstance(plan, Plan):
                    return plan
                self._is_listening = True
            wake_s = min((each for each in (plan.until_s, next_s) if each is not None), default=None)
            with contextlib.suppress(Empty):
                self._bell.get(timeout=None if wake_s is None else max(0.0, wake_s - now_s))

    def _drop_late(self, now_s: float) -> float | None:
        """Give up what is past its deadline; returns the next deadline."""
        next_s: float | None = None
        late: list[Ending] = []
        for request in self._scheduler.requests:
            if request.deadline_s is None:
                continue
            if now_s >= request.deadline_s:
                self._scheduler.remove(request)
                late.append((request, self._lateness(request)))
            elif next_s is None or request.deadline_s < next_s:
                next_s = request.deadline_s
        self._hand_back(late)
        return next_s

    def _lateness(self, request: Request) -> PetalsError:
        if request.is_blocked:
            return OverloadedError(
                "the server's attention cache is full: try again later", retry_after_s=self._limits.retry_after_s
            )
        return DeadlineExceededError("the request was not computed before its deadline")

    def _compute(self, plan: Plan) -> Outcome:
        """One turn: whether work that goes alone is complete, and what failed."""
        first = plan.parts[0].request
        assert isinstance(first, Work)
        failures: list[tuple[Request, Exception]] = []
        try:
            if first.key is None:
                num_tokens = plan.parts[0].num_tokens
                if num_tokens == first.num_tokens_left:
                    num_tokens = first.max_turn_tokens  # pads, which the scheduler does not count, are no reason to cut
                return Outcome(is_complete=first.advance(num_tokens), failures=failures)
            first.advance_together(plan.parts)
        except Exception as error:
            if len(plan.parts) == 1:
                failures.append((first, self._explain_of(error, first)))
            else:
                # Computing again writes the same to the same places, so those who are not to blame lose nothing.
                log.info("a turn of %d requests failed (%s): computing them one by one", len(plan.parts), error)
                for part in plan.parts:
                    try:
                        first.advance_together((part,))
                    except Exception as own_error:
                        failures.append((part.request, self._explain_of(own_error, part.request)))
        return Outcome(is_complete=False, failures=failures)

    def _explain_of(self, error: Exception, request: Request) -> Exception:
        """What who has asked for work is told of an error."""
        return error if isinstance(request, Call) else self._explain(error, request.num_tokens)

    def _explain(self, error: Exception, num_tokens: int) -> PetalsError:
        """What a client is told of an error."""
        if isinstance(error, PetalsError):
            return error
        if is_out_of_memory(error):
            log.warning("no memory for a request of %d tokens", num_tokens)
            return OverloadedError(
                "the server has no memory for the request now", retry_after_s=self._limits.retry_after_s
            )
        log.error("computing a request of %d tokens failed", num_tokens, exc_info=error)
        return RemoteFailureError(f"the server failed to compute the request: {type(error).__name__}")

    def _failed_to_begin(self) -> list[Ending]:
        """What the last plan could not take up; with the lock held."""
        failures: list[Ending] = [*self._scheduler.failures]
        self._scheduler.failures.clear()
        return failures

    def _absorb(self, plan: Plan, outcome: Outcome, started_s: float, ended_s: float) -> list[Ending]:
        """What is complete or failed by a turn; the rest stays with the scheduler. With the lock held."""
        for request, _ in outcome.failures:
            self._scheduler.remove(request)
        finished: list[Ending] = [*outcome.failures]
        finished += [(work, None) for work in self._scheduler.absorb(plan, ended_s - started_s, ended_s)]
        if outcome.is_complete:
            self._scheduler.remove(plan.parts[0].request)
            finished.append((plan.parts[0].request, None))
        return finished

    def _hand_back(self, finished: Sequence[Ending]) -> None:
        if finished:
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody is left to be told.
                self._loop.call_soon_threadsafe(self._settle, finished)

    # --- in the event loop --------------------------------------------------------------------------------------------

    def _settle(self, finished: Sequence[Ending]) -> None:
        for work, error in finished:
            assert isinstance(work, Work)
            future = work.future
            assert future is not None
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        self._note_pages()

    def _note_pages(self) -> None:
        """Say so if there are more free pages than before."""
        if self.pages is None:
            return
        before, self._num_pages_held = self._num_pages_held, self.pages.num_held
        if self._num_pages_held < before and self.on_freed is not None:
            self.on_freed()
