"""Steps that wait behind each other are computed at once, and answered one by one."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_core.errors import InvalidRequestError, PetalsError, SessionLengthError
from petals_core.net.stream import Stream
from petals_core.tensors.codec import Encoding, TensorSpec, encode
from petals_core.tensors.states import States
from petals_core.testing.network import address_of, dialing, run_clean, serving
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Message, NewAttempt, Routed, Step, StepResult
from petals_server.ring.kept_outputs import KeptOutputs
from petals_server.ring.next_hops import NextHops
from petals_server.ring.session import Received, RingSession
from petals_server.testing import TIMEOUT_S, Client, random_states, served, until
from petals_server.testing.ring import IDS, ask, by_hand, chain, connect, route, tensor
from petals_server.work import microseconds

JOIN_TOKENS = 64
Rows = Sequence[torch.Tensor]
"""New tokens [N, H] of each row of a step."""
Sent = tuple[Step, list[memoryview]]


def as_step(number: int, rows: Rows, *, encoding: Encoding | None = None, **fields: Any) -> Sent:
    """A step that may be joined with those before it, and its payload."""
    spec, payload = encode(torch.cat(list(rows)), encoding=encoding)
    step = Step(
        step=number,
        keep=0,
        row_tokens=tuple(map(len, rows)),
        tensors=(spec.to_wire(),),
        deadline_ms=10_000,
        join_tokens=JOIN_TOKENS,
    )
    return replace(step, **fields), payload


def as_steps(steps: Sequence[Rows], *changes: dict[str, Any]) -> list[Sent]:
    """Steps that follow each other, with changes to the first of them."""
    keeps = itertools.accumulate((max(map(len, rows)) for rows in steps[:-1]), initial=0)
    return [
        as_step(number, rows, **{"keep": keep, **(changes[number] if number < len(changes) else {})})
        for number, (rows, keep) in enumerate(zip(steps, keeps, strict=True))
    ]


def cut(hidden_RNH: torch.Tensor, lengths: Sequence[int]) -> list[Rows]:  # noqa: N803
    """Steps of equally many tokens of each row."""
    return [part.unbind() for part in hidden_RNH.split(list(lengths), dim=1)]


# --- which are joined -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def recorded(
    *, has_cache: bool, num_waiting: int = 3, compute_s: float = 0.0
) -> AsyncIterator[tuple[Stream, list[list[int]], list[RingSession]]]:
    """A session that returns what it gets: its client's stream, the numbers of steps that it is given together, and
    itself.

    The first is held until others wait. It says that each step took ``compute_s``.
    """
    groups: list[list[int]] = []
    places: list[RingSession] = []

    async def handle(place: RingSession, steps: Sequence[Received]) -> None:
        groups.append([each.step.step for each in steps])
        await until(lambda: len(groups) > 1 or len(place._arrivals._queue) == num_waiting)
        for each in steps:
            states = States(spec=TensorSpec.from_wire(each.step.tensors[0]), payload=[each.message.received_payload])
            compute_us = microseconds(compute_s)
            await place.deliver(each.step, states, queue_us=0, compute_us=compute_us, deadline_s=each.deadline_s)

    async with dialing() as dialer:

        async def serve(stream: Stream) -> None:
            next_hops = NextHops(dialer, fingerprint="0" * 64, is_local=True)
            outputs = KeptOutputs(0)
            ring = RingSession(
                stream, next_hops=next_hops, outputs=outputs, has_cache=has_cache, route_timeout_s=TIMEOUT_S
            )
            places.append(ring)
            await ring.run(handle, max_idle_s=TIMEOUT_S)

        async with serving(serve) as listener, dialing() as other:
            connection = await other.connect([address_of(listener)], peer_id=listener.peer_id)
            yield connection.open_stream(Priority.DECODE), groups, places


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, [[0], [1, 2, 3]]),
        ({2: {"keep": 4}}, [[0], [1], [2], [3]]),
        ({2: {"attempt": 1}, 3: {"attempt": 1}}, [[0], [2, 3]]),
        ({2: {"join_tokens": None}}, [[0], [1], [2, 3]]),
        ({2: {"join_tokens": 2}}, [[0], [1], [2, 3]]),
        ({2: {"join_tokens": 3}, 3: {"join_tokens": 3}}, [[0], [1, 2], [3]]),
        ({1: {"row_order": (0,)}}, [[0], [1, 2, 3]]),
        ({2: {"row_order": (0,)}}, [[0], [1], [2, 3]]),
        ({1: {"position_runs": (((9, 1),),)}}, [[0], [1], [2, 3]]),
        ({1: {"row_tokens": (0,)}, 2: {"row_tokens": (0,), "keep": 2}, 3: {"keep": 2}}, [[0], [1, 2, 3]]),
        ({1: {"row_tokens": (0,)}, 2: {"row_tokens": (0,), "keep": 2, "join_tokens": 1}}, [[0], [1], [2], [3]]),
        ({3: {"row_tokens": (1, 1)}}, [[0], [1, 2], [3]]),
    ],
)
@pytest.mark.parametrize("has_cache", [True, False])
def test_which_steps_are_joined(changes: dict[int, dict[str, Any]], groups: list[list[int]], has_cache: bool) -> None:
    """Steps of two tokens, and then of one, two and one."""
    sizes = (2, 1, 2, 1)
    steps = as_steps(
        [[torch.zeros(size, 4)] for size in sizes], *(changes.get(number, {}) for number in range(len(sizes)))
    )

    async def run() -> None:
        async with recorded(has_cache=has_cache) as (stream, seen, _):
            await stream.send(*steps[0])
            await until(lambda: seen == [[0]])
            for step in steps[1:]:
                await stream.send(*step)
            await until(lambda: seen[-1][-1] == 3)
            assert seen == (groups if has_cache else [[each] for group in groups for each in group])
            stream.cancel()

    run_clean(run())


def has_taken(place: RingSession, number: int) -> bool:
    """Whether a step has come, and nothing waits."""
    return place.progress().received == number and not place._arrivals._queue


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are to come are waited for as long as tests last."""
    monkeypatch.setattr("petals_server.ring.session._MAX_WAIT_S", TIMEOUT_S)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("compute_s", "changes", "groups"),
    [
        (TIMEOUT_S, [{}, {"is_followed": True}], [[0], [1, 2]]),
        (TIMEOUT_S, [{}, {"is_followed": True, "join_tokens": None}], [[0], [1, 2]]),
        (0.0, [{}, {"is_followed": True}], [[0], [1], [2]]),
        (TIMEOUT_S, [{}, {"is_followed": True, "join_tokens": 3}], [[0], [1], [2]]),
        (TIMEOUT_S, [], [[0], [1], [2]]),
    ],
    ids=["slow server", "first of its group", "fast server", "full group", "nothing follows"],
)
def test_one_that_is_to_follow_is_waited_for(
    compute_s: float, changes: list[dict[str, Any]], groups: list[list[int]]
) -> None:
    """As long as computing would take the one that is there, and as long as another one may be joined with that."""
    steps = as_steps([[torch.zeros(2, 4)]] * 3, *changes)

    async def run() -> None:
        async with recorded(has_cache=True, num_waiting=1, compute_s=compute_s) as (stream, seen, places):
            await stream.send(*steps[0])
            await until(lambda: seen == [[0]])
            await stream.send(*steps[1])
            await until(lambda: seen == groups[:-1] and has_taken(places[0], 1))
            await stream.send(*steps[2])
            await until(lambda: seen[-1][-1] == 2)
            assert seen == groups
            stream.cancel()

    run_clean(run())


@pytest.mark.parametrize(("compute_s", "waits_s"), [(0.5, [0.25, 0.5, 0.5]), (0.0, [0.0, 0.0, 0.0])])
def test_how_long_one_is_waited_for(compute_s: float, waits_s: list[float]) -> None:
    """After a step of two tokens, with one, two and 64 of them at hand."""
    steps = as_steps([[torch.zeros(2, 4)]])

    async def run() -> None:
        async with recorded(has_cache=True, num_waiting=0, compute_s=compute_s) as (stream, _, places):
            await stream.send(*steps[0])
            await receive(stream, steps)
            assert [places[0]._least_s(num_tokens) for num_tokens in (1, 2, 64)] == waits_s
            stream.cancel()

    run_clean(run())


def test_who_sends_them_one_by_one_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petals_server.ring.session._MAX_WAIT_S", 0.1)
    steps = as_steps([[torch.zeros(1, 4)]] * 40, {}, *[{"is_followed": True}] * 38)

    async def run() -> None:
        async with recorded(has_cache=True, num_waiting=0, compute_s=TIMEOUT_S) as (stream, seen, _):
            for step in steps:
                await stream.send(*step)
                await asyncio.sleep(0.02)
            await until(lambda: seen[-1][-1] == 39)
            assert len(seen) > 2
            stream.cancel()

    run_clean(run())


@pytest.mark.usefixtures("patient")
def test_another_attempt_ends_the_waiting() -> None:
    steps = as_steps([[torch.zeros(2, 4)]] * 2, {}, {"is_followed": True})

    async def run() -> None:
        async with recorded(has_cache=True, num_waiting=1, compute_s=TIMEOUT_S) as (stream, seen, places):
            await stream.send(*steps[0])
            await until(lambda: seen == [[0]])
            await stream.send(*steps[1])
            await receive(stream, steps[:1])
            await until(lambda: has_taken(places[0], 1))
            await stream.send(*as_step(1, [torch.zeros(2, 4)], keep=2, attempt=1))
            (reply,) = await receive(stream, steps[1:])
            assert _result(reply).attempt == 1
            assert seen == [[0], [1]]
            stream.cancel()

    run_clean(run())


# --- what comes of them -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def held(client: Client, *, num_waiting: int) -> AsyncIterator[None]:
    """Let the device do nothing until one step waits for it, and others behind that."""
    engine = client.server.holding.engine
    release = threading.Event()
    holding = asyncio.create_task(engine.call(release.wait))
    try:
        await until(lambda: engine.num_queued == 1)
        yield
        (ring,) = client.server.holding.handler.ring._sessions.values()
        await until(lambda: engine.num_queued == 2 and len(ring._arrivals._queue) == num_waiting)
    finally:
        release.set()
        await holding


async def first_alone(client: Client, stream: Stream, steps: Sequence[Sent]) -> None:
    """Send steps of which the first is computed by itself, and the others come meanwhile."""
    async with held(client, num_waiting=len(steps) - 1):
        await stream.send(*steps[0])
        await until(lambda: client.server.holding.engine.num_queued == 2)
        for step in steps[1:]:
            await stream.send(*step)


async def receive(stream: Stream, steps: Sequence[Sent]) -> list[Message]:
    """The answers to steps."""
    replies = [await stream.receive(timeout_s=TIMEOUT_S) for _ in steps]
    assert [_result(reply).step for reply in replies] == [step.step for step, _ in steps]
    return replies


def _result(message: Message) -> StepResult:
    assert isinstance(message.body, StepResult)
    return message.body


def assert_joined(replies: Sequence[Message], steps: Sequence[Sent]) -> None:
    """The answers say that each step took its share of what all took together."""
    counts = [sum(step.row_tokens) for step, _ in steps]
    spent_us = [_result(reply).compute_us for reply in replies]
    for count, each_us in zip(counts, spent_us, strict=True):
        assert abs(each_us - sum(spent_us) * count / sum(counts)) <= 2


@pytest.mark.parametrize("family", ["checkpoint", "bloom", "bamba"], ids=["packed", "padded", "alone"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_results_are_those_of_each_step(family: str, num_rows: int, request: pytest.FixtureRequest) -> None:
    """The first one with a pad, the second with another order of rows."""
    folder: Path = request.getfixturevalue(family)
    first, *others = cut(random_states(num_rows, 24), [5, 3, 1, 7, 8])
    rows = [[row[5 - count :] for row, count in zip(first, (5, 2), strict=False)], *others]
    order = tuple(reversed(range(num_rows)))
    steps = as_steps(rows, {}, {"row_order": order})

    async def run() -> None:
        async with served(folder) as client:
            session = await client.open(num_rows)
            expected = [
                torch.cat(await session.step(each, row_order=step.row_order))
                for each, (step, _) in zip(rows, steps, strict=True)
            ]
            session.stream.cancel()
            await until(lambda: not client.server.holding.handler.ring._sessions)
            session = await client.open(num_rows)
            await first_alone(client, session.stream, steps)
            replies = await receive(session.stream, steps)
            assert_joined(replies[1:], steps[1:])
            for reply, each in zip(replies, expected, strict=True):
                torch.testing.assert_close(tensor(reply), each, rtol=1e-3, atol=2e-4)

    run_clean(run())


def test_those_that_were_joined_are_passed_on_as_such(checkpoint: Path) -> None:
    """By a server that reaches no next one, so that its client sees what that would get."""
    steps = as_steps(cut(random_states(1, 8), [2, 1, 2, 3]))

    async def run() -> None:
        async with chain(checkpoint) as (to_first, _, session, _):
            await ask(to_first, route(0), Routed)
            await first_alone(to_first, session.stream, steps)
            passed = [(await session.stream.receive(timeout_s=TIMEOUT_S)).body for _ in steps]
            assert all(isinstance(step, Step) for step in passed)
            assert [step.is_followed for step in passed] == [None, True, True, None]

    run_clean(run())


def test_answers_have_the_encoding_of_their_step(checkpoint: Path) -> None:
    rows = cut(random_states(1, 16), [4, 4, 4, 4])
    encodings = [None, Encoding.INT8, None, Encoding.FLOAT16]
    steps = as_steps(rows, *({"encoding": encoding} for encoding in encodings))

    async def run() -> None:
        async with served(checkpoint) as client:
            session = await client.open()
            expected = [
                await session.step(each, encoding=encoding) for each, encoding in zip(rows, encodings, strict=True)
            ]
            session.stream.cancel()
            await until(lambda: not client.server.holding.handler.ring._sessions)
            session = await client.open()
            await first_alone(client, session.stream, steps)
            replies = await receive(session.stream, steps)
            assert_joined(replies[1:], steps[1:])
            for reply, (step, _), (states,) in zip(replies, steps, expected, strict=True):
                specs = [TensorSpec.from_wire(body.tensors[0]) for body in (_result(reply), step)]
                assert specs[0] == specs[1]
                torch.testing.assert_close(tensor(reply), states, rtol=0.0, atol=0.05)

    run_clean(run())


@pytest.mark.parametrize(
    ("max_length", "changes", "error"),
    [(64, {"tensors": (encode(torch.zeros(2, 64))[0].to_wire(),)}, InvalidRequestError), (8, {}, SessionLengthError)],
)
def test_those_before_one_that_is_refused_are_served(
    checkpoint: Path, max_length: int, changes: dict[str, Any], error: type[PetalsError]
) -> None:
    rows = cut(random_states(1, 9), [3, 3, 3])
    steps = as_steps(rows, {}, {}, changes)

    async def run() -> None:
        async with served(checkpoint) as client:
            session = await client.open()
            expected = [await session.step(each) for each in rows]
            session.stream.cancel()
            await until(lambda: not client.server.holding.handler.ring._sessions)
            session = await client.open(max_length=max_length)
            await first_alone(client, session.stream, steps)
            replies = await receive(session.stream, steps[:2])
            for reply, (states,) in zip(replies, expected[:2], strict=True):
                torch.testing.assert_close(tensor(reply), states, rtol=1e-4, atol=1e-5)
            with pytest.raises(error) as caught:
                await session.stream.receive(timeout_s=TIMEOUT_S)
            assert caught.value.attempt == 0
            await session.stream.send(NewAttempt(attempt=1))
            session.attempt, session.num_steps, session.num_columns = 1, 2, 6
            (again,) = await session.step([rows[2][0][:1]])
            torch.testing.assert_close(again, expected[2][0][:1], rtol=1e-4, atol=1e-5)

    run_clean(run())


def test_what_the_server_before_has_sent_is_joined_too(checkpoint: Path) -> None:
    rows = cut(random_states(1, 14), [2, 3, 4, 5])
    steps = as_steps(rows)

    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            expected = await by_hand(await to_first.open(), await to_second.open(), [each for (each,) in rows])
            await connect(to_first, to_second)
            ring = to_second.server.holding.handler.ring._sessions[IDS[1]]
            release = threading.Event()
            holding = asyncio.create_task(to_second.server.holding.engine.call(release.wait))
            try:
                await first.stream.send(*steps[0])
                await until(lambda: to_second.server.holding.engine.num_queued == 2)
                for step in steps[1:]:
                    await first.stream.send(*step)
                await until(lambda: len(ring._arrivals._queue) == 3)
            finally:
                release.set()
            replies = await receive(second.stream, steps)
            assert_joined(replies[1:], steps[1:])
            for reply, states in zip(replies, expected, strict=True):
                torch.testing.assert_close(tensor(reply), states, rtol=1e-4, atol=1e-5)
            await holding

    run_clean(run())
