"""Who may push, of which attempts, and at whose credit."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from petals_core.errors import InvalidRequestError, PetalsError
from petals_core.testing.network import run_clean
from petals_core.wire.messages import NewAttempt, Progress, Routed, StepResult
from petals_server.testing import TIMEOUT_S, until
from petals_server.testing.ring import IDS, STATES, ask, chain, connect, pushed, route, step, stranger, tensor


def test_who_is_named_may_push_until_another_is(checkpoint: Path) -> None:
    async def run() -> None:
        async with (
            chain(checkpoint) as (_, to_second, _, second),
            stranger(to_second.server) as (dialer, connection),
        ):
            await ask(to_second, route(1, is_last=True, previous=dialer.peer_id.digest), Routed)
            stream = await pushed(connection)
            await stream.send(*step(0, STATES, 0))
            assert tensor(await second.stream.receive(timeout_s=TIMEOUT_S)).shape == STATES.shape
            await ask(to_second, route(1, is_last=True), Routed)
            with pytest.raises(PetalsError):
                await stream.receive(timeout_s=TIMEOUT_S)

    run_clean(run())


def test_steps_of_an_earlier_attempt_are_dropped(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            await connect(to_first, to_second)
            await second.stream.send(NewAttempt(attempt=1))
            for number, attempt in ((0, 1), (1, 0), (2, 1)):
                await first.stream.send(*step(number, STATES, 3 * bool(number), attempt=attempt))
            numbers = []
            for _ in range(2):
                reply = (await second.stream.receive(timeout_s=TIMEOUT_S)).body
                assert isinstance(reply, StepResult)
                numbers.append(reply.step)
            assert numbers == [0, 2]

    run_clean(run())


def test_steps_of_an_attempt_wait_until_the_client_has_named_it(checkpoint: Path) -> None:
    """Whoever pushes may be told of it first; they are computed in their order then."""

    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            await connect(to_first, to_second)
            ring = to_second.server.holding.handler.ring._sessions[IDS[1]]
            for number, attempt in ((0, 1), (1, 1), (2, 2)):
                await first.stream.send(*step(number, STATES, 3 * number, attempt=attempt))
                await until(lambda count=number: len(ring._arrivals._early) > count)  # type: ignore[misc]
            assert ring.progress() == Progress(attempt=0)
            for attempt, numbers in ((1, (0, 1)), (2, (2,))):
                await second.stream.send(NewAttempt(attempt=attempt))
                for number in numbers:
                    reply = (await second.stream.receive(timeout_s=TIMEOUT_S)).body
                    assert isinstance(reply, StepResult)
                    assert (reply.step, reply.attempt) == (number, attempt)
                assert ring.progress() == Progress(attempt=attempt, received=numbers[-1], computed=numbers[-1])

    run_clean(run())


def test_who_pushes_can_not_begin_an_attempt(checkpoint: Path) -> None:
    """Neither is the client's own then taken for an earlier one, nor does the server before name any."""

    async def run() -> None:
        async with (
            chain(checkpoint) as (_, to_second, _, second),
            stranger(to_second.server) as (dialer, connection),
        ):
            await ask(to_second, route(1, is_last=True, previous=dialer.peer_id.digest), Routed)
            stream = await pushed(connection)
            ring = to_second.server.holding.handler.ring._sessions[IDS[1]]
            await stream.send(*step(0, STATES, 0, attempt=1 << 32))
            await until(lambda: bool(ring._arrivals._early))
            await ask(to_second, route(1, attempt=1, is_last=True), Routed)
            assert not ring._arrivals._early
            await second.stream.send(*step(0, STATES[:2], 0, attempt=1))
            assert len(tensor(await second.stream.receive(timeout_s=TIMEOUT_S))) == 2

            await ask(to_second, route(1, attempt=2, is_last=True, previous=dialer.peer_id.digest), Routed)
            stream = await pushed(connection)
            await stream.send(NewAttempt(attempt=3))
            with pytest.raises(InvalidRequestError, match="takes steps"):
                await stream.receive(timeout_s=TIMEOUT_S)
            assert ring.progress().attempt == 2

    run_clean(run())


def test_what_a_session_has_not_begun_at_its_end_costs_its_senders_no_credit(checkpoint: Path) -> None:
    """Neither the client nor the server before, whose connections serve other sessions too."""

    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            await connect(to_first, to_second)
            release = threading.Event()
            busy = asyncio.create_task(to_second.server.holding.engine.call(release.wait))
            ring = to_second.server.holding.handler.ring._sessions[IDS[1]]
            try:
                await second.stream.send(*step(0, STATES, 0))  # with which the session is busy
                await until(lambda: ring._arrivals._received is not None and not ring._arrivals._queue)
                await second.stream.send(*step(1, STATES, 0))
                await first.stream.send(*step(2, STATES, 0))
                await until(lambda: len(ring._arrivals._queue) == 2)
                await first.stream.send(*step(3, STATES, 0, attempt=1))
                await until(lambda: len(ring._arrivals._early) == 1)
                second.stream.cancel()
                await until(lambda: ring._stream.error is not None)
            finally:
                release.set()
            await busy
            await until(lambda: not to_second.server.holding.handler.ring._sessions)
            connections = to_second.server._listener._connections
            assert len(connections) == 2
            for connection in connections:
                assert [lane.outstanding_bytes - lane.due_bytes for lane in connection.wire._lanes] == [0, 0]

    run_clean(run())
