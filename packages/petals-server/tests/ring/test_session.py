"""Steps that are computed and passed on, and that are sent again from what is kept."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from petals_core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NoSessionError,
    OverloadedError,
    RemoteFailureError,
)
from petals_core.steps import StepRequest
from petals_core.tensors.codec import encode
from petals_core.tensors.states import States
from petals_core.testing.network import run_clean
from petals_core.wire.messages import Progress, ProgressRequest, Replay, Replayed, Route, Routed, Step, StepResult
from petals_server.testing import TIMEOUT_S, until
from petals_server.testing.ring import IDS, STATES, announcement, ask, by_hand, chain, connect, route, step, tensor


def test_a_step_goes_around(checkpoint: Path) -> None:
    """In by the first server, out of the last, with the times of both; the same as by hand."""

    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            expected = await by_hand(await to_first.open(), await to_second.open(), [STATES, STATES[:1]])
            await connect(to_first, to_second)
            for number, (states, keep) in enumerate(((STATES, 0), (STATES[:1], 3))):
                await first.stream.send(*step(number, states, keep))
                reply = await second.stream.receive(timeout_s=TIMEOUT_S)
                assert torch.equal(tensor(reply), expected[number])
                assert isinstance(reply.body, StepResult)
                assert reply.body.step == number
                assert reply.body.hops is not None
                assert len(reply.body.hops) == 2
            progress = await ask(to_second, ProgressRequest(session_id=IDS[1]), Progress)
            assert progress == Progress(attempt=0, received=1, computed=1)

    run_clean(run())


def test_only_the_states_that_a_step_wants_come_back(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            expected = await by_hand(await to_first.open(), await to_second.open(), [STATES, STATES])
            await connect(to_first, to_second)
            for number, wanted in enumerate((2, 0, 9)):
                keep = 3 * min(number, 1)
                await first.stream.send(*step(number, STATES, keep, wanted=wanted))
                reply = await second.stream.receive(timeout_s=TIMEOUT_S)
                assert isinstance(reply.body, StepResult)
                if wanted:
                    assert torch.equal(tensor(reply), expected[min(number, 1)][-wanted:])
                else:
                    assert (reply.body.tensors, reply.received_payload.nbytes) == ((), 0)

    run_clean(run())


def test_without_a_next_server_the_client_gets_the_step_to_pass_on(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            expected = await by_hand(await to_first.open(), await to_second.open(), [STATES])
            await ask(to_first, route(0), Routed)
            await first.stream.send(*step(0, STATES, 0))
            carried = await first.stream.receive(timeout_s=TIMEOUT_S)
            assert isinstance(carried.body, Step)
            await second.stream.send(carried.body, carried.payload)
            reply = await second.stream.receive(timeout_s=TIMEOUT_S)
            assert torch.equal(tensor(reply), expected[0])

    run_clean(run())


def test_what_is_pushed_is_checked_and_its_errors_go_to_the_client(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            await connect(to_first, to_second)
            await first.stream.send(*step(0, STATES, 0))
            await second.stream.receive(timeout_s=TIMEOUT_S)
            second_client = await second.step([STATES], keep=0)  # the client itself may send too
            assert second_client[0].shape == STATES.shape
            await second.step([STATES[:1]], keep=0)
            await first.stream.send(*step(4, STATES, 3))
            with pytest.raises(InvalidRequestError, match="keeps 3 columns where only 1") as caught:
                await second.stream.receive(timeout_s=TIMEOUT_S)
            assert caught.value.attempt == 0

    run_clean(run())


def test_kept_outputs_rebuild_the_next_server(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            others = await to_first.open(), await to_second.open()
            expected = await by_hand(*others, [STATES, STATES[:1], STATES[1:2], STATES[2:]])
            await connect(to_first, to_second)
            for number, (states, keep) in enumerate(((STATES, 0), (STATES[:1], 3), (STATES[1:2], 4))):
                await first.stream.send(*step(number, states, keep))
                await second.stream.receive(timeout_s=TIMEOUT_S)
            second.stream.cancel()
            await asyncio.sleep(0)
            third = await to_second.open(session_id=b"c" * 16)
            await asyncio.gather(
                ask(
                    to_second,
                    Route(
                        session_id=b"c" * 16,
                        attempt=1,
                        deadline_ms=5000,
                        is_last=True,
                        previous=to_first.server.peer_id.digest,
                    ),
                    Routed,
                ),
                ask(
                    to_first,
                    route(0, attempt=1, next=announcement(to_second.server), next_session=b"c" * 16),
                    Routed,
                ),
            )
            request = Replay(session_id=IDS[0], attempt=1, before=2, passes=0, max_tokens=100, deadline_ms=5000)
            assert await ask(to_first, request, Replayed) == Replayed(last=1)
            ended = (await third.stream.receive(timeout_s=TIMEOUT_S)).body
            assert isinstance(ended, StepResult)
            assert (ended.step, ended.tensors) == (1, ()), "four tokens travel as one step"
            for number, (states, keep) in ((2, (STATES[1:2], 4)), (3, (STATES[2:], 5))):
                await first.stream.send(*step(number, states, keep, attempt=1))
                reply = await third.stream.receive(timeout_s=TIMEOUT_S)
                torch.testing.assert_close(tensor(reply), expected[number], rtol=1e-5, atol=1e-5)

    run_clean(run())


def test_a_replay_ends_with_its_session(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, _):
            await connect(to_first, to_second)
            ring = to_first.server.holding.handler.ring._sessions[IDS[0]]
            release = threading.Event()
            busy = asyncio.create_task(to_first.server.holding.engine.call(release.wait))
            try:
                await first.stream.send(*step(0, STATES, 0))
                request = Replay(session_id=IDS[0], attempt=1, before=1, passes=0, max_tokens=9, deadline_ms=5000)
                replaying = asyncio.create_task(ask(to_first, request, Replayed))
                await until(lambda: bool(ring._arrivals._replays))
                first.stream.cancel()
                await until(lambda: ring._stream.error is not None)
            finally:
                release.set()
            with pytest.raises(NoSessionError):
                await replaying
            await busy

    run_clean(run())


def test_a_replay_that_can_not_be_done_ends_the_session(checkpoint: Path) -> None:
    """Whatever went wrong: neither who asked nor the session is left waiting."""

    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, _):
            await connect(to_first, to_second)
            ring = to_first.server.holding.handler.ring._sessions[IDS[0]]
            for number, order in enumerate((None, (7,))):  # there is no row 7
                kept = StepRequest(keep=3 * number, row_tokens=(3,), row_order=order)
                ring._kept.append(number, kept, States(spec=encode(STATES)[0], payload=()), 1)
            request = Replay(session_id=IDS[0], attempt=1, before=2, passes=0, max_tokens=9, deadline_ms=5000)
            with pytest.raises(NoSessionError):
                await ask(to_first, request, Replayed)
            with pytest.raises(RemoteFailureError, match="internal error"):
                await first.stream.receive(timeout_s=TIMEOUT_S)

    run_clean(run())


def test_a_replay_whose_turn_does_not_come_in_time(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, _):
            await connect(to_first, to_second)
            release = threading.Event()
            busy = asyncio.create_task(to_first.server.holding.engine.call(release.wait))
            try:
                await first.stream.send(*step(0, STATES, 0))
                request = Replay(session_id=IDS[0], attempt=1, before=1, passes=0, max_tokens=9, deadline_ms=1)
                for _ in range(8):
                    with pytest.raises(DeadlineExceededError, match="were not done in time"):
                        await ask(to_first, request, Replayed)
                with pytest.raises(OverloadedError, match="too many replays"):  # they are all still in the queue
                    await ask(to_first, request, Replayed)
            finally:
                release.set()
            await busy

    run_clean(run())
