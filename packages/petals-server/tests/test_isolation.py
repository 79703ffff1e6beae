"""Sessions that share turns and pages do not notice each other: bad numbers, reused pages, clients that vanish."""

from __future__ import annotations

import asyncio
import gc
import math
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from petals_core.errors import InvalidRequestError, OverloadedError, PetalsError
from petals_core.testing.factories import make_checkpoint
from petals_core.testing.network import run_clean
from petals_server.config import ServerLimits
from petals_server.server import Server
from petals_server.testing import Client, Session, connected, random_states, served, until

NUM_CLIENTS = 50
MAX_FREEING_S = 5.0
PROMPT, TOKEN = random_states(1, 9)[0], random_states(1, 1, seed=1)[0]
CACHE_TOKENS = 4096


@pytest.fixture(scope="module", params=["llama", "gemma2", "bloom", "bamba"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed, packed with windows, padded, and not batched."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, num_blocks=2)


async def together(*steps: tuple[Session, torch.Tensor]) -> list[torch.Tensor]:
    """Steps that are all there when the device is free again."""
    rows = await asyncio.gather(*(session.step([states]) for session, states in steps))
    return [row for (row,) in rows]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_bad_numbers_are_carried_and_stay_in_their_session(model: Path, number: float) -> None:
    broken = PROMPT.clone()
    broken[4, 3] = number

    async def run() -> None:
        async with served(model, cache_tokens=CACHE_TOKENS) as client:
            reference = await client.open()
            expected = [(await reference.step([states]))[0] for states in (PROMPT, TOKEN)]
            sessions = [await client.open() for _ in range(3)]
            first = await together((sessions[0], PROMPT), (sessions[1], broken), (sessions[2], PROMPT))
            second = await together(*((session, TOKEN) for session in sessions))
            assert not first[1][4:].isfinite().all()
            for healthy in (0, 2):
                assert torch.allclose(first[healthy], expected[0], rtol=1e-5, atol=1e-5)
                assert torch.allclose(second[healthy], expected[1], rtol=1e-5, atol=1e-5)
            # What the broken one leaves in its pages must not reach those who get them next.
            await sessions[1].stream.finish()
            await until(lambda: client.server.num_sessions == 3)
            for _ in range(2):
                heirs = [await client.open() for _ in range(3)]
                for session in heirs:
                    assert torch.allclose((await session.step([PROMPT[:5]]))[0], expected[0][:5], rtol=1e-5, atol=1e-5)
                for session in heirs:
                    await session.stream.finish()
                await until(lambda: client.server.num_sessions == 3)

    run_clean(run())


def test_pages_that_others_have_filled_tell_nothing(model: Path) -> None:
    """A cache of just enough pages, so that each session gets those that another one has filled."""
    states = [random_states(1, 40, seed=seed)[0] for seed in range(3)]

    async def run() -> None:
        async with served(model, cache_tokens=CACHE_TOKENS) as client:
            session = await client.open()
            expected = []
            for each in states:
                session.num_columns = 0
                expected.append((await session.step([each], keep=0))[0])
        room = 512 if client.server.model.state_tokens else 48
        async with served(model, cache_tokens=room) as client:
            for _ in range(2):
                for each, result in zip(states, expected, strict=True):
                    session = await client.open(max_length=40)
                    parts = [(await session.step([each[start : start + 20]]))[0] for start in (0, 20)]
                    assert torch.allclose(torch.cat(parts), result, rtol=1e-5, atol=1e-5)
                    await session.stream.finish()
                    await until(lambda: client.server.num_sessions == 0)

    run_clean(run())


async def held(server: Server) -> tuple[object, ...]:
    """Everything that clients take from a server."""
    gc.collect()
    return (
        server.num_sessions,
        server.cache_tokens_left,
        server.model.pages.num_held,
        server.holding.engine.num_queued,
        server._listener.num_connections,
        server._listener.num_streams,
        len(asyncio.all_tasks()),
    )


def test_fifty_clients_that_vanish_in_the_middle_of_a_step_leave_nothing(checkpoint: Path) -> None:
    async def run() -> None:
        limits = ServerLimits(max_turn_tokens=64)
        async with served(checkpoint, cache_tokens=16_384, limits=limits) as client:
            server = client.server
            session = await client.open()
            (before,) = await session.step([PROMPT])
            state = await held(server)
            async with AsyncExitStack() as others:
                clients: list[Client] = [
                    await others.enter_async_context(connected(server)) for _ in range(NUM_CLIENTS)
                ]
                sessions = [await other.open(max_length=300) for other in clients]
                steps = [
                    asyncio.ensure_future(each.step([random_states(1, 200)[0]], deadline_ms=60_000))
                    for each in sessions
                ]
                await until(lambda: server.model.pages.num_held > 200)  # some are computed, most of them wait
                assert server.holding.engine.num_queued > NUM_CLIENTS // 2
                for other in clients:
                    other.connection._link.abort()
                for step in steps:
                    with pytest.raises(PetalsError):
                        await step
                async with asyncio.timeout(MAX_FREEING_S):
                    await until(lambda: server.num_sessions == 1)
                    while await held(server) != state:  # noqa: ASYNC110 -- there is no event for all of it
                        await asyncio.sleep(0.01)
            (again,) = await session.step([PROMPT], keep=0)
            assert torch.allclose(before, again, rtol=1e-5, atol=1e-5)

    run_clean(run())


def test_a_second_session_of_an_id_is_refused_and_the_first_goes_on(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client, connected(client.server) as other:
            session = await client.open(session_id=b"0123456789abcdef")
            (before,) = await session.step([PROMPT])
            for thief in (client, other):
                with pytest.raises(InvalidRequestError, match="a session of that id"):
                    await thief.open(session_id=b"0123456789abcdef")
            (again,) = await session.step([PROMPT], keep=0)
            assert torch.equal(before, again)
            assert client.server.num_sessions == 1

    run_clean(run())


def test_beyond_its_room_a_session_is_refused_and_others_go_on(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint, cache_tokens=64) as client:
            patient, greedy = await client.open(max_length=64), await client.open(max_length=64)
            await greedy.step([random_states(1, 48)[0]])
            (first,) = await patient.step([PROMPT])
            with pytest.raises(OverloadedError, match="the step needs 16 tokens of attention cache") as refusal:
                await greedy.step([PROMPT], keep=48, deadline_ms=100)
            assert refusal.value.retry_after_s is not None
            (again,) = await patient.step([PROMPT], keep=0)
            assert torch.allclose(first, again, rtol=1e-5, atol=1e-5)
            await patient.stream.finish()
            await until(lambda: client.server.num_sessions == 1)
            assert (await greedy.step([PROMPT], keep=48))[0].shape == PROMPT.shape

    run_clean(run())
