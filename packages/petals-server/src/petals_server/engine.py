"""The one thread that owns the device: it decides whose turn it is, computes, and hands the outcome back.

The event loop puts work into an inbox and awaits a future. The thread sorts the inbox into a backlog, takes the most
urgent work, computes one turn of it, and either queues it again or wakes the event loop once. Nothing else touches the
model or a session's cache while its work is under way, so neither needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, final

from petals_core.errors import DeadlineExceededError, DrainingError, OverloadedError, PetalsError, RemoteFailureError
from petals_server.config import ServerLimits
from petals_server.scheduling import Backlog, Urgency

T = TypeVar("T")
log = logging.getLogger(__name__)

_UNFINISHED: Final = object()


class Work(ABC, Generic[T]):
    """Something that the device computes, in one turn or several."""

    def __init__(self, *, urgency: Urgency, num_tokens: int, deadline_s: float | None) -> None:
        self.urgency = urgency
        self.num_tokens = num_tokens
        self.deadline_s = deadline_s
        """On ``time.monotonic``'s clock: work that is not finished by then is dropped. None: no deadline."""
        self.queue_s = 0.0
        """Time from arrival to the first turn."""
        self.compute_s = 0.0
        """Time of all turns."""
        self._arrived_s = time.monotonic()
        self._is_started = False
        self._future: asyncio.Future[T] | None = None

    @abstractmethod
    def advance(self) -> bool:
        """Compute one turn, in the device's thread; True when the result is there.

        Raises:
            PetalsError: the request is at fault, or can't be served; there will be no further turn.
        """

    @abstractmethod
    def result(self) -> T:
        """What came of it, once ``advance`` has returned True; called in the device's thread."""


@final
class Call(Work[T]):
    """A function that is to run in the device's thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(urgency=Urgency.DECODE, num_tokens=0, deadline_s=None)
        self._function = function
        self._result: T

    def advance(self) -> bool:
        self._result = self._function()
        return True

    def result(self) -> T:
        return self._result


class Engine:
    """Runs work on the device, one turn at a time. Belongs to the event loop that made it."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Work[Any] | None] = queue.SimpleQueue()
        self._backlog: Backlog[Work[Any]] = Backlog()
        self._num_queued = 0
        self._num_queued_tokens = 0
        self._is_closed = False
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="petals-device", daemon=True)
        self._thread.start()

    @property
    def num_queued(self) -> int:
        """Work that waits or is under way."""
        return self._num_queued

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
        future: asyncio.Future[T] = self._loop.create_future()
        work._future = future
        self._num_queued += 1
        self._num_queued_tokens += work.num_tokens
        self._inbox.put(work)
        return await future

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the device's thread and return its result; what it raises is raised here."""
        return await self.compute(Call(function))

    async def close(self) -> None:
        """Drop all work (its callers get ``DrainingError``), and end the thread after the turn under way."""
        if self._is_closed:
            return
        self._is_closed = True
        self._inbox.put(None)
        await self._stopped.wait()
        self._thread.join()  # It has nothing left to do but to return.

    # --- in the device's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._decide()) is not None:
            outcome = self._compute(work)
            self._absorb(work, outcome)
            del work, outcome  # An idle engine must not keep the last request's tensors.
        with contextlib.suppress(RuntimeError):  # The loop may be closed, then nobody waits.
            self._loop.call_soon_threadsafe(self._stopped.set)

    def _decide(self) -> Work[Any] | None:
        """Wait for work and take what is most urgent; None when the engine is closed."""
        while True:
            is_idle = not self._backlog
            while is_idle or self._inbox.qsize():
                arrived = self._inbox.get()
                if arrived is None:
                    self._drop_all()
                    return None
                self._backlog.push(arrived, arrived.urgency)
                is_idle = False
            work = self._backlog.pop()
            assert work is not None
            assert work._future is not None
            now = time.monotonic()
            if work._future.cancelled():
                self._hand_back(work, DrainingError("cancelled"))
            elif work.deadline_s is not None and now >= work.deadline_s:
                self._hand_back(work, DeadlineExceededError("the request was not computed before its deadline"))
            else:
                if not work._is_started:
                    work._is_started = True
                    work.queue_s = now - work._arrived_s
                return work

    def _compute(self, work: Work[Any]) -> Any:
        """One turn: the result, ``_UNFINISHED``, or the exception that is to be raised by ``compute``."""
        started_s = time.monotonic()
        try:
            return work.result() if work.advance() else _UNFINISHED
        except PetalsError as error:
            return error
        except Exception as error:
            if isinstance(work, Call):
                return error
            if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
                log.warning("no memory for a request of %d tokens", work.num_tokens)
                return OverloadedError(
                    "the server has no memory for the request now", retry_after_s=self._limits.retry_after_s
                )
            log.exception("computing a request of %d tokens failed", work.num_tokens)
            return RemoteFailureError(f"the server failed to compute the request: {type(error).__name__}")
        finally:
            work.compute_s += time.monotonic() - started_s

    def _absorb(self, work: Work[Any], outcome: Any) -> None:
        """Queue unfinished work again, hand a result back."""
        if outcome is _UNFINISHED:
            self._backlog.push(work, work.urgency)
        else:
            self._hand_back(work, outcome)

    def _hand_back(self, work: Work[Any], outcome: Any) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody is left to be told.
            self._loop.call_soon_threadsafe(self._settle, work, outcome)

    def _drop_all(self) -> None:
        while (work := self._backlog.pop()) is not None:
            self._hand_back(work, DrainingError("the server is stopping"))
        while self._inbox.qsize():
            work = self._inbox.get()
            if work is not None:
                self._hand_back(work, DrainingError("the server is stopping"))

    # --- in the event loop --------------------------------------------------------------------------------------------

    def _settle(self, work: Work[Any], outcome: Any) -> None:
        self._num_queued -= 1
        self._num_queued_tokens -= work.num_tokens
        future = work._future
        assert future is not None
        if future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
