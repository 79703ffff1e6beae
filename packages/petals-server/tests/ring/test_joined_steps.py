"""Steps that came while others were computed are computed at once, and answered one by one."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_core.errors import InvalidRequestError
from petals_core.steps import MAX_JOINED_TOKENS
from petals_core.tensors.codec import Encoding, encode
from petals_core.testing.network import run_clean
from petals_core.wire.messages import Message, NewAttempt, Step, StepResult
from petals_server.testing import TIMEOUT_S, Client, Session, random_states, served, until
from petals_server.testing.ring import tensor
from petals_server.work import Work

Rows = Sequence[torch.Tensor]
"""New tokens [N, H] of each row of a step."""


def cut(hidden_RNH: torch.Tensor, lengths: Sequence[int]) -> list[Rows]:  # noqa: N803
    """Steps of equally many tokens of each row."""
    return [part.unbind() for part in hidden_RNH.split(list(lengths), dim=1)]


def as_step(number: int, rows: Rows, keep: int, **changes: Any) -> tuple[Step, list[memoryview]]:
    """A step and its payload."""
    spec, payload = encode(torch.cat(list(rows)), encoding=changes.pop("encoding", None))
    step = Step(
        step=number,
        keep=keep,
        row_tokens=tuple(map(len, rows)),
        tensors=(spec.to_wire(),),
        deadline_ms=10_000,
    )
    return replace(step, **changes), payload


def as_steps(steps: Sequence[Rows], **changes: Any) -> list[tuple[Step, list[memoryview]]]:
    """Steps that follow each other."""
    keeps = itertools.accumulate((max(map(len, rows)) for rows in steps[:-1]), initial=0)
    return [
        as_step(number, rows, keep, **changes) for number, (rows, keep) in enumerate(zip(steps, keeps, strict=True))
    ]


async def receive(session: Session, count: int) -> list[Message]:
    """The answers to so many steps."""
    replies = [await session.stream.receive(timeout_s=TIMEOUT_S) for _ in range(count)]
    assert [reply.body.step for reply in replies if isinstance(reply.body, StepResult)] == list(range(count))
    return replies


async def send(
    client: Client, session: Session, steps: Sequence[tuple[Step, list[memoryview]]], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Send steps of which the first is being computed while the others come; gives the tokens of all work that is asked
    of the device from then on."""
    engine = client.server.holding.engine
    computed: list[int] = []
    compute = engine.compute

    async def note(work: Work[Any]) -> Any:
        computed.append(work.num_tokens)
        return await compute(work)

    release = threading.Event()
    holding = asyncio.create_task(engine.call(release.wait))
    await until(lambda: engine.num_queued == 1)
    monkeypatch.setattr(engine, "compute", note)
    (ring,) = client.server.holding.handler.ring._sessions.values()
    try:
        await session.stream.send(*steps[0])
        await until(lambda: len(computed) == 1)
        for step in steps[1:]:
            await session.stream.send(*step)
        await until(lambda: len(ring._arrivals._queue) == len(steps) - 1)
    finally:
        release.set()
    await holding
    return computed


@pytest.mark.parametrize("family", ["checkpoint", "bloom", "bamba"], ids=["packed", "padded", "alone"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_results_are_those_of_each_step(
    family: str, num_rows: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue(family)
    hidden_RNH = random_states(num_rows, 24)  # noqa: N806
    first, *others = cut(hidden_RNH, [5, 3, 1, 7, 8])
    steps = [[row[5 - count :] for row, count in zip(first, (5, 2), strict=False)], *others]

    async def run() -> None:
        async with served(folder) as client:
            session = await client.open(num_rows)
            one_by_one = [await session.step(rows) for rows in steps]
            session.stream.cancel()
            await until(lambda: not client.server.holding.handler.ring._sessions)
            session = await client.open(num_rows)
            computed = await send(client, session, as_steps(steps), monkeypatch)
            replies = await receive(session, len(steps))
            assert computed == [sum(map(len, steps[0])), 19 * num_rows]
            for reply, expected in zip(replies, one_by_one, strict=True):
                torch.testing.assert_close(tensor(reply), torch.cat(expected), rtol=1e-3, atol=2e-4)
            session.num_steps, session.num_columns = len(steps), 24
            (again,) = (await session.step([hidden_RNH[0, :1]] * num_rows))[:1]
            assert again.shape == (1, 64)

    run_clean(run())


def test_no_more_are_joined_than_make_sense(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = MAX_JOINED_TOKENS // 4
    hidden_RNH = random_states(1, 10 * size)  # noqa: N806

    async def run() -> None:
        async with served(checkpoint) as client:
            session = await client.open(max_length=10 * size)
            computed = await send(client, session, as_steps(cut(hidden_RNH, [size] * 10)), monkeypatch)
            replies = await receive(session, 10)
            assert computed == [size, 4 * size, 4 * size, size]
            spent_us = [reply.body.compute_us for reply in replies if isinstance(reply.body, StepResult)]
            assert len(set(spent_us[1:5])) == 1, "each has its share"

    run_clean(run())


def test_answers_have_the_encoding_of_their_step(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = cut(random_states(1, 12), [4, 4, 4])

    async def run() -> None:
        async with served(checkpoint) as client:
            session = await client.open()
            expected = [await session.step(rows, encoding=Encoding.INT8) for rows in steps]
            session.stream.cancel()
            await until(lambda: not client.server.holding.handler.ring._sessions)
            session = await client.open()
            computed = await send(client, session, as_steps(steps, encoding=Encoding.INT8), monkeypatch)
            replies = await receive(session, 3)
            assert computed == [4, 8]
            for reply, rows in zip(replies, expected, strict=True):
                assert "int8" in reply.body.tensors[0]
                torch.testing.assert_close(tensor(reply), rows[0], rtol=0.02, atol=0.02)

    run_clean(run())


def test_a_step_that_is_not_as_it_says_costs_its_attempt_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = cut(random_states(1, 9), [3, 3, 3])

    async def run() -> None:
        async with served(checkpoint) as client:
            session = await client.open()
            *good, (step, payload) = as_steps([first, second, third])
            bad = replace(step, tensors=(encode(first[0][:2])[0].to_wire(),))
            await send(client, session, [*good, (bad, payload)], monkeypatch)
            await receive(session, 1)
            with pytest.raises(InvalidRequestError, match="hidden states of shape") as caught:
                await session.stream.receive(timeout_s=TIMEOUT_S)
            assert caught.value.attempt == 0
            await session.stream.send(NewAttempt(attempt=1))
            session.attempt, session.num_steps, session.num_columns = 1, 1, 3
            assert (await session.step(second))[0].shape == (3, 64)

    run_clean(run())
