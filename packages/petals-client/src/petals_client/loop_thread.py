"""One background thread with an event loop, which any thread may hand coroutines to.

The handing over is the price of every step, so it is kept small: one wake-up of the loop and one of the caller.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from petals_core.errors import InvalidRequestError
from petals_core.net.loop import new_event_loop

T = TypeVar("T")
_CANCEL_TIMEOUT_S = 5.0
_ALIVE_CHECK_S = 1.0
_CLOSED = "this client was closed: make a new one"
_threads: weakref.WeakSet[LoopThread] = weakref.WeakSet()
_inherited: list[object] = []
"""What a forked child got from its parent and must never touch: closing a copied socket or poller would reach into the
parent's connections."""


class _Loop:
    """A running loop, its thread, and the process that both live in."""

    def __init__(self, name: str) -> None:
        self.loop = new_event_loop()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()


class Caller(Generic[T]):
    """Who waits in a thread of its own for a result that comes out of a loop; all but ``wait`` belongs to the loop.

    It is given the result, or a coroutine whose result that is.
    """

    def __init__(self, begin: Callable[[Caller[T]], None]) -> None:
        self._begin = begin
        self._task: asyncio.Task[T] | None = None
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._is_cancelled = False
        # A bare lock is the lightest thing that one thread can wait on and another can signal.
        self._done = threading.Lock()
        self._done.acquire()

    def start(self) -> None:
        """Let it begin."""
        if self._is_cancelled:
            return
        try:
            self._begin(self)
        except BaseException as error:
            self._error = error
            self._done.release()

    def give(self, result: T) -> None:
        """Hand the result over: it goes on at once, while the loop may still put things in order."""
        if not self._is_cancelled:
            self._result.append(result)
            self._done.release()

    def go_on(self, coroutine: Coroutine[Any, Any, T]) -> None:
        """Let a coroutine find the result."""
        if self._is_cancelled:
            coroutine.close()
            return
        self._task = asyncio.get_running_loop().create_task(coroutine)
        self._task.add_done_callback(lambda _: self._done.release())

    def cancel(self) -> None:
        """It has been interrupted and wants nothing more."""
        self._is_cancelled = True
        if self._task is not None:
            self._task.cancel()
        elif self._done.locked():
            self._done.release()

    def wait(self, timeout_s: float = -1) -> bool:
        """Wait for the end; an interrupt (Ctrl-C) breaks the wait."""
        return self._done.acquire(timeout=timeout_s)

    def result(self) -> T:
        """What was given, behind the wait; raises what the coroutine raised."""
        if self._error is not None:
            raise self._error
        return self._task.result() if self._task is not None else self._result[0]


class LoopThread:
    """A loop in a daemon thread, made when it is first needed, and made anew in a forked child.

    ``forget`` is called in a child after a fork, before anything else: what belongs to the parent's loop has to be let
    go of there.
    """

    def __init__(self, *, name: str = "petals-client", forget: Callable[[], None] | None = None) -> None:
        self._name = name
        self._forget = forget
        self._lock = threading.Lock()
        self._running: _Loop | None = None
        self._is_closed = False
        _threads.add(self)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and return what it returns, or raise what it raises.

        When the wait is interrupted the coroutine is cancelled, and has ended when the interrupt goes on.

        Raises:
            InvalidRequestError: this was closed, or the caller is the loop's own thread.
        """

        def begin(caller: Caller[T]) -> None:
            caller.go_on(coroutine)

        try:
            return self.call(begin)
        finally:
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()

    def call(self, begin: Callable[[Caller[T]], None]) -> T:
        """Call ``begin`` in the loop and return what the caller is given, by it or later; as ``run``, with no task."""
        running = self._ensure()
        caller = Caller(begin)
        try:
            running.loop.call_soon_threadsafe(caller.start)
            while not caller.wait(_ALIVE_CHECK_S):
                if not running.thread.is_alive():
                    raise RuntimeError("the loop has ended")
        except RuntimeError:
            raise InvalidRequestError(_CLOSED) from None
        except BaseException:
            with contextlib.suppress(RuntimeError, KeyboardInterrupt):
                running.loop.call_soon_threadsafe(caller.cancel)
                caller.wait(_CANCEL_TIMEOUT_S)
            raise
        try:
            return caller.result()
        except asyncio.CancelledError:  # by ``close`` in another thread
            raise InvalidRequestError(_CLOSED) from None

    def start_soon(self, callback: Callable[[], object]) -> None:
        """Call something in the loop soon, if the loop runs."""
        running = self._running
        if running is not None and not self._is_closed:
            with contextlib.suppress(RuntimeError):  # closed a moment ago
                running.loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """Cancel what still runs in the loop and end its thread; idempotent."""
        with self._lock:
            self._is_closed = True
            running, self._running = self._running, None
        if running is None:
            return
        with contextlib.suppress(RuntimeError):
            running.loop.call_soon_threadsafe(_stop, running.loop)
        if threading.current_thread() is not running.thread:
            running.thread.join(_CANCEL_TIMEOUT_S)

    def _ensure(self) -> _Loop:
        running = self._running
        if running is None:
            with self._lock:
                if self._is_closed:
                    raise InvalidRequestError(_CLOSED)
                if self._running is None:
                    self._running = _Loop(self._name)
                running = self._running
        if threading.current_thread() is running.thread:
            raise InvalidRequestError("a blocking call of Petals can't be made inside its own event loop")
        return running

    def _after_fork(self) -> None:
        _inherited.append(self._running)
        self._running = None
        self._lock = threading.Lock()
        if self._forget is not None:
            self._forget()


def inherit(value: object) -> None:
    """Keep something of the parent process alive for ever, so that nothing finalizes it in this forked child."""
    _inherited.append(value)


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    async def stop() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_TIMEOUT_S)
        loop.stop()

    loop.create_task(stop())  # the loop lives exactly as long as this task


def _reset_all() -> None:
    for thread in list(_threads):
        thread._after_fork()


def _close_all() -> None:
    # A daemon thread that runs while the interpreter goes down may crash it.
    for thread in list(_threads):
        thread.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
atexit.register(_close_all)
