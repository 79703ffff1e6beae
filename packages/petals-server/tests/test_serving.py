"""What a server refuses, and what it leaves behind: nothing."""

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_core.errors import (
    CacheLostError,
    DeadlineExceededError,
    DrainingError,
    InvalidRequestError,
    OverloadedError,
    PeerConnectionError,
    PetalsError,
    SessionLengthError,
    WrongModelError,
)
from petals_core.net.stream import EndOfStreamError
from petals_core.testing.network import run_clean
from petals_core.wire.messages import SessionOpened, Step
from petals_server.config import ServerLimits
from petals_server.scheduling.scheduler import MAX_TURNS_LEFT_OUT
from petals_server.testing import Client, Session, connected, random_states, served, until

STATES = random_states(1, 3)[0]


async def assert_is_usable(session: Session) -> None:
    """A refusal has changed nothing."""
    assert torch.isfinite((await session.step([STATES], keep=session.num_columns))[0]).all()


def spec(shape: list[int], dtype: str = "float32", num_bytes: int | None = None) -> tuple[Any, ...]:
    size = {"float32": 4, "int64": 8}[dtype]
    product = 1
    for length in shape:
        product *= length
    return ((shape, dtype, dtype, "none", product * size if num_bytes is None else num_bytes),)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"fingerprint": "f" * 64}, WrongModelError, "another checkpoint"),
        ({"start": 0, "end": 2}, WrongModelError, "holds blocks 1:4"),
        ({"start": 3, "end": 3}, WrongModelError, "do not include 3:3"),
        ({"start": 3, "end": 5}, WrongModelError, "do not include 3:5"),
        ({"max_length": 1001}, OverloadedError, "may need 1008 tokens of attention cache and this server has 1000"),
        ({"num_rows": 3, "max_length": 400}, OverloadedError, "may need 1200 tokens"),
    ],
)
def test_sessions_that_can_not_be_opened(
    checkpoint: Path, changes: dict[str, Any], error: type[PetalsError], text: str
) -> None:
    async def run() -> None:
        async with served(checkpoint, blocks=(1, 4)) as client:
            with pytest.raises(error, match=text):
                await client.open(**changes)
            await assert_is_usable(await client.open())

    run_clean(run())


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"keep": 4}, InvalidRequestError, "keeps 4 columns where only 3"),
        ({"row_tokens": (2, 1)}, InvalidRequestError, "2 rows in a session of 1"),
        ({"row_tokens": (4,)}, InvalidRequestError, "row_tokens and the model ask for"),
        ({"row_tokens": (62,)}, SessionLengthError, "3 columns and 62 new ones .* max_length of 64"),
        ({"row_order": (1,)}, InvalidRequestError, "row_order"),
        ({"row_order": (0, 0)}, InvalidRequestError, "row_order"),
        ({"position_runs": (((0, 2),),)}, InvalidRequestError, "one position to each token"),
        ({"position_runs": (((0, 3),), ((0, 3),))}, InvalidRequestError, "one position to each token"),
        ({"tensors": ()}, InvalidRequestError, "0 tensors"),
        ({"tensors": spec([3, 64]) * 2}, InvalidRequestError, "2 tensors"),
        ({"tensors": spec([3, 63])}, InvalidRequestError, "hidden states of shape"),
        ({"tensors": spec([1, 3, 64])}, InvalidRequestError, "hidden states of shape"),
        ({"tensors": spec([3, 64], "int64")}, InvalidRequestError, "no floating-point"),
        ({"tensors": spec([3, 64], num_bytes=7)}, InvalidRequestError, "is said to have 7"),
        ({"tensors": ("nonsense",)}, InvalidRequestError, "not a list of five"),
        ({"payload": [memoryview(b"12345678")]}, InvalidRequestError, "came with 8"),
        ({"payload": []}, InvalidRequestError, "came with 0"),
    ],
)
def test_a_refused_step_hurts_nobody(
    checkpoint: Path, changes: dict[str, Any], error: type[PetalsError], text: str
) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            session, other = await client.open(), await client.open()
            await session.step([STATES])
            with pytest.raises(error, match=text):
                await session.step([STATES], **changes)
            await assert_is_usable(session)
            await assert_is_usable(other)

    run_clean(run())


def test_broken_compression_is_the_clients_fault(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            session = await client.open()
            with pytest.raises(PetalsError, match="compressed payload"):
                await session.step(
                    [STATES],
                    tensors=(([3, 64], "float32", "float32", "zstd", 4),),
                    payload=[memoryview(b"oops")],
                )
            await assert_is_usable(session)

    run_clean(run())


def test_forward_requests_are_checked(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint, limits=ServerLimits(max_forward_tokens=4)) as client:
            with pytest.raises(InvalidRequestError, match="5 tokens is over the 4"):
                await client.forward(random_states(1, 5).unbind())
            with pytest.raises(WrongModelError):
                await client.forward([STATES], fingerprint="0" * 64)
            with pytest.raises(InvalidRequestError, match="hidden states of shape"):
                await client.forward([STATES], row_tokens=(1, 1))
            client.server.holding.handler.model = replace(client.server.model, max_scores=8)
            with pytest.raises(InvalidRequestError, match="row of 3 tokens in one go"):
                await client.forward([STATES])
            assert (await client.forward([STATES[:2]]))[0].shape == (2, 64)
            await assert_is_usable(await client.open())

    run_clean(run())


def test_a_step_needs_a_session(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            stream = client.connection.open_stream()
            step = Step(step=0, keep=0, row_tokens=(3,), tensors=spec([3, 64]), deadline_ms=1000)
            await stream.send(step, [memoryview(bytes(3 * 64 * 4))])
            with pytest.raises(InvalidRequestError, match="open a session first"):
                await stream.receive(timeout_s=10)
            session = await client.open()
            await session.stream.send(SessionOpened(cache_tokens_left=1))
            with pytest.raises(InvalidRequestError, match="a session takes steps"):
                await session.stream.receive(timeout_s=10)
            await assert_is_usable(session)

    run_clean(run())


def test_what_a_vanished_client_held_is_free_at_once(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            server = client.server
            async with connected(server) as other:
                sessions = [await other.open(num_rows=2, max_length=96) for _ in range(3)]
                await sessions[0].step([STATES, STATES])
                assert (server.num_sessions, server.cache_tokens_left) == (3, 1000 - 3 * 48)
            await until(lambda: server.num_sessions == 0)
            assert server.cache_tokens_left == 1000
            kept = await client.open()
            cancelled = await client.open()
            cancelled.stream.cancel()
            await until(lambda: server.num_sessions == 1)
            await kept.stream.finish()
            with pytest.raises(EndOfStreamError):
                await kept.stream.receive(timeout_s=10)
            await until(lambda: server.cache_tokens_left == 1000)

    run_clean(run())


@pytest.mark.parametrize("is_garbage", [False, True], ids=["vanishes", "sends garbage"])
def test_a_client_that_goes_wrong_in_the_middle_of_a_step_hurts_nobody(checkpoint: Path, is_garbage: bool) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            server, session = client.server, await client.open()
            (before,) = await session.step([STATES])
            async with connected(server) as other:
                for _ in range(50):
                    other.connection.open_stream()  # and never a word on it
                broken = await other.open(max_length=600)
                async with Blocker(client) as blocker:
                    step = asyncio.ensure_future(broken.step([random_states(1, 500)[0]]))
                    await blocker.until_queued(1)
                    link = other.connection._link
                    if is_garbage:
                        link.write([b"\xff" * 100])
                    else:
                        link.abort()
                    await until(lambda: server.num_sessions == 1)
                step.cancel()
            (again,) = await session.step([STATES], keep=0)
            assert torch.equal(before, again)
            assert (server.num_sessions, server.cache_tokens_left) == (1, 1000 - 16)
            assert server.holding.engine.num_queued == 0

    run_clean(run())


def test_limits_per_peer(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint, limits=ServerLimits(max_sessions_per_peer=1, retry_after_s=7)) as client:
            await client.open()
            with pytest.raises(OverloadedError, match="1 sessions open here") as refusal:
                await client.open()
            assert refusal.value.retry_after_s == 7
            async with connected(client.server) as other:
                await other.open()

    run_clean(run())


def test_idle_sessions_end(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint, limits=ServerLimits(max_idle_s=0.05)) as client:
            session = await client.open()
            with pytest.raises(CacheLostError, match="idle for"):
                await session.stream.receive(timeout_s=10)
            await until(lambda: client.server.cache_tokens_left == 1000)

    run_clean(run())


class Blocker:
    """Keeps a server's device busy until it is released."""

    def __init__(self, client: Client) -> None:
        self._released = threading.Event()
        self._engine = client.server.holding.engine
        self._entered = threading.Event()
        self._call = asyncio.ensure_future(self._engine.call(self._block))

    def _block(self) -> None:
        self._entered.set()
        self._released.wait()

    async def __aenter__(self) -> "Blocker":
        await until(self._entered.is_set)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._released.set()
        await self._call

    async def until_queued(self, number: int) -> None:
        await until(lambda: self._engine.num_queued == 1 + number)


def test_work_whose_deadline_has_passed_is_dropped(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            session = await client.open()
            async with Blocker(client) as blocker:
                late = asyncio.ensure_future(session.step([STATES], deadline_ms=1))
                await blocker.until_queued(1)
                deadline_s = time.monotonic() + 0.001
                await until(lambda: time.monotonic() > deadline_s)
            with pytest.raises(DeadlineExceededError):
                await late
            await assert_is_usable(session)

    run_clean(run())


def test_too_much_waiting_work_is_refused(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint, limits=ServerLimits(max_queued_tokens=5)) as client:
            sessions = [await client.open() for _ in range(2)]
            async with Blocker(client) as blocker:
                first = asyncio.ensure_future(sessions[0].step([STATES]))
                await blocker.until_queued(1)
                with pytest.raises(OverloadedError, match="3 tokens wait"):
                    await sessions[1].step([STATES])
            assert (await first)[0].shape == STATES.shape
            await assert_is_usable(sessions[1])

    run_clean(run())


def test_cancelled_work_is_skipped(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            session, other = await client.open(), await client.open()
            engine = client.server.holding.engine
            async with Blocker(client) as blocker:
                step = asyncio.ensure_future(session.step([STATES]))
                await blocker.until_queued(1)
                session.stream.cancel()
                await until(lambda: client.server.num_sessions == 1)
            with pytest.raises(PetalsError):
                await step
            await assert_is_usable(other)
            assert engine.num_queued == 0

    run_clean(run())


def test_a_step_that_fails_half_way_ends_its_session_alone(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint, limits=ServerLimits(max_turn_tokens=1)) as client:
            session, other = await client.open(max_length=500), await client.open()
            engine = client.server.holding.engine
            step = asyncio.ensure_future(session.step([random_states(1, 400)[0]], deadline_ms=1000))
            await until(lambda: engine.num_queued == 1)
            # Behind so many urgent calls the step has had its first turn, of 400.
            await asyncio.gather(*(engine.call(lambda: None) for _ in range(MAX_TURNS_LEFT_OUT + 1)))
            async with Blocker(client):
                deadline_s = time.monotonic() + 1
                await until(lambda: time.monotonic() > deadline_s)
            with pytest.raises(DeadlineExceededError):
                await step
            await until(lambda: client.server.num_sessions == 1)
            await assert_is_usable(other)

    run_clean(run())


def test_info(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint, blocks=(1, 3), public_name="lab 7") as client:
            await client.open(max_length=96)
            info = await client.info()
            assert (info.start, info.end, info.num_blocks, info.state) == (1, 3, 4, "online")
            assert (info.cache_tokens_left, info.num_sessions, info.public_name) == (976, 1, "lab 7")

    run_clean(run())


def test_draining_lets_sessions_finish_and_takes_no_new_ones(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            session = await client.open()
            await session.step([STATES])
            stopping = asyncio.ensure_future(client.server.stop(drain_timeout_s=30))
            await until(lambda: client.connection.is_draining)
            with pytest.raises(DrainingError):
                await client.open()
            await session.step([STATES])
            assert not stopping.done()
            await session.stream.finish()
            await stopping
            assert client.server.num_sessions == 0

    run_clean(run())


def test_draining_ends_after_its_bound(checkpoint: Path) -> None:
    others = set(threading.enumerate())  # swarms that many tests share may live in this process

    async def run() -> None:
        async with served(checkpoint) as client:
            session = await client.open()
            await client.server.stop(drain_timeout_s=0.05)
            with pytest.raises((DrainingError, PeerConnectionError)):
                await session.step([STATES])
            await client.server.stop()
        started = set(threading.enumerate()) - others
        assert not [thread for thread in started if thread.name == "petals-device"]

    run_clean(run())
