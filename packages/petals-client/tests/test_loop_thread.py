"""Coroutines of any thread in one background loop: results, errors, interrupts, ends."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from petals_client.loop_thread import Caller, LoopThread
from petals_core.errors import InvalidRequestError, RemoteFailureError


async def value_of(value: int) -> int:
    await asyncio.sleep(0)
    return value


def test_results_and_errors() -> None:
    thread = LoopThread()
    assert [thread.run(value_of(number)) for number in range(3)] == [0, 1, 2]

    async def fail() -> None:
        raise RemoteFailureError("broken")

    with pytest.raises(RemoteFailureError, match="broken"):
        thread.run(fail())
    thread.close()


def test_many_threads() -> None:
    thread = LoopThread()
    results = []
    callers = [threading.Thread(target=lambda n=n: results.append(thread.run(value_of(n)))) for n in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    thread.close()
    assert sorted(results) == list(range(8))


def test_within_a_running_loop() -> None:
    thread = LoopThread()

    async def run() -> int:
        return thread.run(value_of(5))

    assert asyncio.run(run()) == 5
    thread.close()


def test_an_interrupt_cancels_the_coroutine_and_waits_for_its_end() -> None:
    thread = LoopThread()
    ended = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    async def wait() -> None:
        try:
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        thread.run(wait())
    assert ended.is_set()
    assert thread.run(value_of(1)) == 1, "the loop does not go on"
    thread.close()


def test_a_caller_goes_on_with_what_it_is_given() -> None:
    thread = LoopThread()
    assert thread.call(lambda caller: caller.give(1)) == 1
    assert thread.call(lambda caller: asyncio.get_running_loop().call_soon(caller.give, 2) and None) == 2
    assert thread.call(lambda caller: caller.go_on(value_of(3))) == 3

    def fail(caller: Caller[int]) -> None:
        raise RemoteFailureError("broken")

    with pytest.raises(RemoteFailureError, match="broken"):
        thread.call(fail)
    thread.close()


def test_an_interrupted_caller_is_given_nothing_more() -> None:
    thread = LoopThread()
    main = threading.main_thread().ident
    assert main is not None
    callers: list[Caller[int]] = []

    def begin(caller: Caller[int]) -> None:
        callers.append(caller)
        signal.pthread_kill(main, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        thread.call(begin)

    def give_late(caller: Caller[int]) -> None:
        callers[0].give(1)
        callers[0].go_on(value_of(2))
        caller.give(3)

    assert thread.call(give_late) == 3
    thread.close()


def test_closing_ends_what_runs() -> None:
    thread = LoopThread()
    started = threading.Event()
    errors = []

    async def wait() -> None:
        started.set()
        await asyncio.Event().wait()

    def run() -> None:
        try:
            thread.run(wait())
        except InvalidRequestError as error:
            errors.append(error.message)

    caller = threading.Thread(target=run)
    caller.start()
    started.wait()
    thread.close()
    caller.join()
    assert errors == ["this client was closed: make a new one"]
    thread.close()
    with pytest.raises(InvalidRequestError, match="was closed"):
        thread.run(value_of(1))


def test_from_the_loop_itself() -> None:
    thread = LoopThread()

    async def run() -> int:
        return thread.run(value_of(1))

    with pytest.raises(InvalidRequestError, match="inside its own event loop"):
        thread.run(run())
    thread.close()
