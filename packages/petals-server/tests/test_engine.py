"""Which thread computes what, and that nothing else changes by it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from petals_core.errors import InvalidRequestError, OverloadedError, PetalsError, RemoteFailureError
from petals_core.testing.network import run_clean
from petals_server.cache.pages import CachePages, plan_groups
from petals_server.config import ServerLimits
from petals_server.engine import MAX_HERE_S, Engine
from petals_server.scheduling.pace import Pace
from petals_server.scheduling.plan import Part
from petals_server.scheduling.request import Urgency
from petals_server.work import Work


class _Step(Work[int]):
    """A decode step whose result is the thread that computed it."""

    def __init__(self, session: object, *, is_quick: bool = True, error: Exception | None = None) -> None:
        super().__init__(urgency=Urgency.DECODE, num_tokens=1, deadline_s=None, session=session, key="steps")
        self._is_quick = is_quick
        self._error = error
        self._thread = 0

    @property
    def is_quick(self) -> bool:
        return self._is_quick

    def advance_together(self, parts: Sequence[Part]) -> None:
        if self._error is not None:
            raise self._error
        for part in parts:
            assert isinstance(part.request, _Step)
            part.request._thread = threading.get_ident()

    def result(self) -> int:
        return self._thread


@asynccontextmanager
async def _engine(turn_s: float = MAX_HERE_S / 10) -> AsyncIterator[Engine]:
    engine = Engine(ServerLimits())
    pages = CachePages(plan_groups([None], num_tokens=64, page_tokens=16), page_tokens=16)
    engine.adopt(pages, Pace(decode_tokens_per_s=1 / turn_s, bulk_tokens_per_s=1000.0, max_turn_tokens=64))
    await engine.call(lambda: None)
    try:
        yield engine
    finally:
        await engine.close()


async def _is_here(engine: Engine, step: _Step) -> bool:
    return await engine.compute(step) == threading.get_ident()


def test_a_session_that_is_alone_is_computed_without_another_thread() -> None:
    async def run() -> list[bool]:
        async with _engine() as engine:
            session = object()
            return [await _is_here(engine, _Step(session)) for _ in range(3)]

    assert run_clean(run())[1:] == [True, True]  # before the first, the device's thread may not wait again yet


def test_a_session_beside_others_is_computed_in_the_thread_of_the_device_where_they_meet() -> None:
    async def run() -> list[bool]:
        async with _engine() as engine:
            sessions = [object(), object()]
            await engine.compute(_Step(sessions[0]))
            return [await _is_here(engine, _Step(session)) for session in (sessions[1], *sessions)]

    assert not any(run_clean(run()))


@pytest.mark.parametrize(("is_quick", "turn_s"), [(False, MAX_HERE_S / 10), (True, MAX_HERE_S * 10)])
def test_what_takes_long_is_computed_in_the_thread_of_the_device(is_quick: bool, turn_s: float) -> None:
    async def run() -> bool:
        async with _engine(turn_s) as engine:
            return await _is_here(engine, _Step(object(), is_quick=is_quick))

    assert not run_clean(run())


def test_a_step_waits_while_the_device_computes_something_else() -> None:
    async def run() -> bool:
        async with _engine() as engine:
            begun, may_end = threading.Event(), threading.Event()

            def occupy() -> None:
                begun.set()
                may_end.wait()

            occupied = asyncio.create_task(engine.call(occupy))
            await asyncio.to_thread(begun.wait)
            step = asyncio.create_task(_is_here(engine, _Step(object())))
            await asyncio.sleep(0)
            assert engine.num_queued == 2
            may_end.set()
            await occupied
            return await step

    assert not run_clean(run())


def test_an_error_in_the_event_loop_is_that_of_its_step_alone() -> None:
    async def run() -> None:
        async with _engine() as engine:
            session = object()
            await engine.compute(_Step(session))
            with pytest.raises(InvalidRequestError, match="no such thing"):
                await engine.compute(_Step(session, error=InvalidRequestError("no such thing")))
            await engine.compute(_Step(session))
            assert engine.num_queued == 0

    run_clean(run())


def test_the_next_token_is_computed_at_once_where_its_session_is_alone() -> None:
    async def run() -> None:
        async with _engine() as engine:
            session, other = object(), object()
            await engine.compute(_Step(session))
            assert engine.compute_here(session, threading.get_ident) == threading.get_ident()
            engine.note_here(session, "peer", started_s=time.monotonic(), ended_s=time.monotonic())
            assert engine.compute_here(other, threading.get_ident) is None  # the first one decodes
            engine.close_session(session, lambda: None)
            await engine.call(lambda: None)
            assert engine.compute_here(other, threading.get_ident) == threading.get_ident()
        assert engine.compute_here(other, threading.get_ident) is None

    run_clean(run())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequestError("no such thing"), InvalidRequestError),
        (MemoryError(), OverloadedError),
        (ValueError("unforeseen"), RemoteFailureError),
    ],
)
def test_an_error_of_the_next_token_is_told_as_any_other(error: Exception, expected: type[PetalsError]) -> None:
    def fail() -> None:
        raise error

    async def run() -> None:
        async with _engine() as engine:
            session = object()
            await engine.compute(_Step(session))
            with pytest.raises(expected):
                engine.compute_here(session, fail)
            await engine.compute(_Step(session))

    run_clean(run())
