"""Steps that are passed on, who may push them, and what is kept of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NextHopError,
    NoSessionError,
    OutputsGoneError,
    OverloadedError,
    PetalsError,
    RemoteFailureError,
)
from petals_core.identity import Identity
from petals_core.net.dialer import Dialer, PeerConnection
from petals_core.net.rpc import call
from petals_core.net.stream import Stream
from petals_core.steps import StepRequest
from petals_core.tensors.codec import TensorSpec, decode, encode
from petals_core.tensors.states import States
from petals_core.testing.network import run_clean
from petals_core.wire.frames import Priority
from petals_core.wire.messages import (
    Message,
    NewAttempt,
    Progress,
    ProgressRequest,
    Push,
    Pushed,
    Replay,
    Replayed,
    Route,
    Routed,
    Step,
    StepResult,
)
from petals_server.config import ServerLimits
from petals_server.server import Server
from petals_server.testing import TIMEOUT_S, Client, Session, config_for, connected, random_states, until

IDS = (b"a" * 16, b"b" * 16)
STATES = random_states(1, 3)[0]


def announcement(server: Server) -> bytes:
    now_s = time.time()
    return SignedAnnouncement.sign(server._describe(now_s, now_s + 60), server._identity).encoded


@asynccontextmanager
async def chain(checkpoint: Path, **changes: Any) -> AsyncIterator[tuple[Client, Client, Session, Session]]:
    """Two servers of neighbouring spans, the clients' connections to them, and a session on each."""
    limits = ServerLimits(route_timeout_s=0.05, **changes)
    async with (
        Server(config_for(checkpoint, blocks=(0, 2), limits=limits)) as first,
        Server(config_for(checkpoint, blocks=(2, 4), limits=limits)) as second,
        connected(first) as to_first,
        connected(second) as to_second,
    ):
        sessions = [
            await client.open(session_id=session_id)
            for client, session_id in zip((to_first, to_second), IDS, strict=True)
        ]
        yield to_first, to_second, *sessions


def route(session: int, **fields: Any) -> Route:
    return Route(**{"session_id": IDS[session], "attempt": 0, "deadline_ms": 5000, "is_last": False, **fields})


@asynccontextmanager
async def stranger(server: Server) -> AsyncIterator[tuple[Dialer, PeerConnection]]:
    """A peer that is none of the chain, connected to one of its servers."""
    dialer = Dialer(identity=Identity.ephemeral())
    try:
        yield dialer, await dialer.connect([server.address], peer_id=server.peer_id)
    finally:
        await dialer.close()


async def pushed(connection: PeerConnection) -> Stream:
    """A stream that pushes steps into the second session."""
    stream = connection.open_stream(Priority.DECODE)
    await stream.send(Push(session_id=IDS[1]))
    assert isinstance((await stream.receive(timeout_s=TIMEOUT_S)).body, Pushed)
    return stream


async def ask(client: Client, request: Any, reply: Any) -> Any:
    return (await call(client.connection, request, reply=reply, timeout_s=TIMEOUT_S)).body


async def connect(to_first: Client, to_second: Client) -> None:
    """Let the first server push to the second."""
    await asyncio.gather(
        ask(to_first, route(0, next=announcement(to_second.server), next_session=IDS[1]), Routed),
        ask(to_second, route(1, is_last=True, previous=to_first.server.peer_id.digest), Routed),
    )


def step(number: int, states: torch.Tensor, keep: int, **fields: Any) -> tuple[Step, list[memoryview]]:
    spec, payload = encode(states)
    return (
        Step(
            step=number,
            keep=keep,
            row_tokens=(len(states),),
            tensors=(spec.to_wire(),),
            deadline_ms=10_000,
            **fields,
        ),
        payload,
    )


def tensor(message: Message) -> torch.Tensor:
    assert isinstance(message.body, (Step, StepResult))
    return decode(TensorSpec.from_wire(message.body.tensors[0]), message.received_payload)


async def by_hand(session: Session, other: Session, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """What comes of states that a client carries from one session to the other."""
    return [(await other.step(await session.step([each])))[0] for each in states]


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


def test_nobody_pushes_into_anothers_session(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second), connected(to_second.server) as stranger:
            await connect(to_first, to_second)
            for session_id in (IDS[1], b"c" * 16):  # one that exists, and one that does not
                stream = stranger.connection.open_stream(Priority.DECODE)
                await stream.send(Push(session_id=session_id))
                with pytest.raises(NoSessionError):
                    await stream.receive(timeout_s=TIMEOUT_S)
                for request, reply in (
                    (route(1, is_last=True), Routed),
                    (ProgressRequest(session_id=session_id), Progress),
                    (
                        Replay(session_id=session_id, attempt=1, before=1, passes=0, max_tokens=9, deadline_ms=99),
                        Replayed,
                    ),
                ):
                    with pytest.raises(NoSessionError):
                        await ask(stranger, request, reply)
            await first.stream.send(*step(0, STATES, 0))
            assert tensor(await second.stream.receive(timeout_s=TIMEOUT_S)).shape == STATES.shape, "it was disturbed"

    run_clean(run())


def test_a_session_id_is_used_once(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, _, _, _):
            with pytest.raises(InvalidRequestError, match="random"):
                await to_first.open(session_id=IDS[0])

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


def test_a_next_server_that_can_not_be_reached(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            encoded = announcement(to_second.server)
            with pytest.raises(NextHopError):  # it does not name the first one
                await ask(to_first, route(0, next=encoded, next_session=IDS[1]), Routed)
            with pytest.raises(PetalsError):
                await ask(to_first, route(0, next=encoded[:-1], next_session=IDS[1]), Routed)
            await connect(to_first, to_second)
            await second.stream.finish()
            outlet = to_first.server.holding.handler.ring._sessions[IDS[0]]._outlet
            assert outlet is not None
            await until(lambda: not outlet.is_open)
            await first.stream.send(*step(0, STATES, 0))
            with pytest.raises(NextHopError):
                await first.stream.receive(timeout_s=TIMEOUT_S)

    run_clean(run())


def test_nobody_learns_through_a_server_what_listens_where(checkpoint: Path) -> None:
    """One answer whatever is wrong with the next server, and only so many of them; who can be reached costs nothing."""

    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, _, _):
            for _ in range(40):
                await connect(to_first, to_second)
                await ask(to_first, route(0), Routed)
            there = announcement(to_second.server)
            elsewhere = to_second.server.address = replace(to_second.server.address, port=9)
            nowhere = announcement(to_second.server)
            told = []
            for encoded in [there, nowhere] * 20:
                with pytest.raises(NextHopError) as caught:  # where it listens, there is no session of that id
                    await ask(to_first, route(0, next=encoded, next_session=bytes(16)), Routed)
                told.append(caught.value.message)
            assert set(told[:32]) == {"the next server can't be reached"}
            assert set(told[36:]) == {"too many next servers can't be reached: try again in a minute"}
            assert str(elsewhere) not in "".join(told)

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
                await until(lambda: bool(ring._replays))
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
                ring.kept.append(number, kept, States(spec=encode(STATES)[0], payload=()), 1)
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


def test_a_public_server_connects_to_no_private_network_for_a_stranger(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, _, _):
            to_first.server.holding.handler.ring.next_hops._is_local = False  # as where its own address is a public one
            with pytest.raises(NextHopError, match="private network"):
                await ask(to_first, route(0, next=announcement(to_second.server), next_session=IDS[1]), Routed)
            to_second.server.address = replace(to_second.server.address, host="localhost")
            with pytest.raises(NextHopError, match="can't be reached"):  # nor where a name leads into one
                await connect(to_first, to_second)

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
                await until(lambda count=number: len(ring._early) > count)  # type: ignore[misc]
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
            await until(lambda: bool(ring._early))
            await ask(to_second, route(1, attempt=1, is_last=True), Routed)
            assert not ring._early
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
                await until(lambda: ring._received is not None and not ring._inbox)
                await second.stream.send(*step(1, STATES, 0))
                await first.stream.send(*step(2, STATES, 0))
                await until(lambda: len(ring._inbox) == 2)
                await first.stream.send(*step(3, STATES, 0, attempt=1))
                await until(lambda: len(ring._early) == 1)
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


def test_outputs_are_kept_within_a_budget(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint, max_kept_bytes=1000) as (to_first, to_second, first, second):
            await connect(to_first, to_second)
            ring = to_first.server.holding.handler.ring
            for number in range(3):
                await first.stream.send(*step(number, STATES[:1], number))
                await second.stream.receive(timeout_s=TIMEOUT_S)
                assert ring.kept_bytes <= 1000
            request = Replay(session_id=IDS[0], attempt=1, before=3, passes=0, max_tokens=100, deadline_ms=5000)
            await second.stream.send(NewAttempt(attempt=1))
            assert await ask(to_first, request, Replayed) == Replayed(last=2)
            await second.stream.receive(timeout_s=TIMEOUT_S)
            await first.stream.send(*step(3, STATES, 3, attempt=1))
            await second.stream.receive(timeout_s=TIMEOUT_S)
            assert ring.kept_bytes == 0
            with pytest.raises(OutputsGoneError):
                await ask(to_first, request, Replayed)

    run_clean(run())


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
