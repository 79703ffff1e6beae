"""The next token by its own way: the same as by the general one, and only where nothing else is to be done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_core.tensors.codec import decode, encode
from petals_core.tensors.states import States
from petals_core.testing.factories import make_checkpoint
from petals_core.testing.network import run_clean
from petals_core.wire.messages import Message, Step
from petals_server.cache.pages import CachePages, plan_groups
from petals_server.cache.tensors import CacheTensors
from petals_server.execution.next_token import NextToken
from petals_server.execution.probe import Form, find_layout
from petals_server.execution.session import SessionState
from petals_server.execution.steps import StepRunner, StepWork
from petals_server.request_checks import check_states, check_step
from petals_server.scheduling.plan import Part
from petals_server.testing import Session, random_states, served
from petals_server.threads import ThreadPlan

PAGE_TOKENS = 4
MAX_LENGTH = 60
TOKENS = random_states(1, MAX_LENGTH, seed=3)[0]


class Bench:
    """A runner of two blocks, and sessions on it."""

    def __init__(self, folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        make_checkpoint(folder, family, num_blocks=2)
        self.span = load_span(Checkpoint.open(folder), 0, 2, dtype=dtype)
        layout = find_layout(self.span)
        assert layout.form is Form.PACKED
        self.pages = CachePages(
            plan_groups([kind.window for kind in layout.kinds], num_tokens=400, page_tokens=PAGE_TOKENS),
            page_tokens=PAGE_TOKENS,
        )
        cache = CacheTensors(layout.kinds, self.pages, dtype=dtype, device=torch.device("cpu"))
        threads = ThreadPlan(decode=1, bulk=1, decode_tokens_per_s=1.0, bulk_tokens_per_s=1.0)
        self.runner = StepRunner(self.span, cache, first_layer=0, form=layout.form, threads=threads, with_replay=True)

    def session(self, num_rows: int = 1) -> SessionState:
        return SessionState(self.span, self.pages, num_rows=num_rows, max_length=MAX_LENGTH)

    def step(self, keep: int, states: torch.Tensor, **changes: Any) -> tuple[Step, memoryview]:
        """A step as it comes from the wire, and its payload."""
        spec, (payload,) = encode(states.to(self.span.dtype))
        shape, *rest = spec.to_wire()
        step = Step(step=0, keep=keep, row_tokens=(len(states),), tensors=((tuple(shape), *rest),), deadline_ms=1000)
        return replace(step, **changes), payload

    def compute(self, session: SessionState, keep: int, states: torch.Tensor, **changes: Any) -> torch.Tensor:
        """A step by the general way."""
        step, payload = self.step(keep, states, **changes)
        check_step(step, session)
        packed = check_states(step, Message(step, (payload,)), self.span.hidden_size)
        work = StepWork(
            session, self.runner, packed, keep=keep, row_order=step.row_order, deadline_s=1e9, max_turn_tokens=100
        )
        work.prepare()
        take = work.take(len(states))
        assert take is not None
        work.advance_together([Part(request=work, num_tokens=len(states), rows=take.rows, copies=take.copies)])
        work.num_done = len(states)
        work.passed(take.rows)
        (result,) = work.result()
        return tensor(States(spec=result.spec, payload=result.buffers)).clone()


def tensor(states: States) -> torch.Tensor:
    return decode(states.spec, b"".join(states.payload))


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("mistral", torch.float32), ("qwen3", torch.bfloat16)]
)
def test_tokens_are_those_of_the_general_way(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    bench = Bench(tmp_path, family, dtype)
    first, second = bench.session(), bench.session()
    for session in (first, second):
        bench.compute(session, 0, TOKENS[:5])
        bench.compute(session, 5, TOKENS[5:6])  # of which the program is made
    token = NextToken(first, bench.runner, max_positions=None)
    outputs: list[tuple[States, torch.Tensor]] = []
    for past in range(6, MAX_LENGTH):
        step, payload = bench.step(past, TOKENS[past : past + 1])
        assert token.fits(step, payload) == (past % PAGE_TOKENS != 0)
        expected = bench.compute(second, past, TOKENS[past : past + 1])
        if token.fits(step, payload):
            output = token.compute(payload)
            assert output is not None
            assert output.spec.to_wire()[0] == [1, bench.span.hidden_size]
            outputs.append((output, expected))
        else:
            assert torch.equal(bench.compute(first, past, TOKENS[past : past + 1]), expected)
        assert not first.is_broken
        assert first.ledger.num_columns == second.ledger.num_columns == past + 1
        assert [len(run.pages) for run in first.pages.runs(0)] == [len(run.pages) for run in second.pages.runs(0)]
    # Compared at the end, because what was given out may still wait to be sent while later tokens are computed.
    assert all(torch.equal(tensor(output), expected) for output, expected in outputs)
    step, payload = bench.step(MAX_LENGTH, TOKENS[:1])
    assert not token.fits(step, payload)


@pytest.mark.parametrize(
    ("changes", "num_bytes"),
    [
        ({"keep": 6}, 256),
        ({"keep": 8}, 256),
        ({"row_tokens": (2,)}, 256),
        ({"row_tokens": (1, 1)}, 256),
        ({"row_order": (0,)}, 256),
        ({"position_runs": (((7, 1),),)}, 256),
        ({"tensors": ()}, 256),
        ({"tensors": (((1, 64), "float32", "float16", "none", 128),)}, 128),
        ({"tensors": (((1, 64), "float32", "float32", "zstd", 256),)}, 256),
        ({"tensors": (((64,), "float32", "float32", "none", 256),)}, 256),
        ({}, 255),
        ({}, 0),
    ],
)
def test_anything_else_goes_the_general_way(changes: dict[str, Any], num_bytes: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    session = bench.session()
    bench.compute(session, 0, TOKENS[:7])
    token = NextToken(session, bench.runner, max_positions=None)
    step, payload = bench.step(7, TOKENS[7:8])
    assert token.fits(step, payload)
    assert not token.fits(replace(step, **changes), payload[:num_bytes])
    assert not NextToken(session, bench.runner, max_positions=7).fits(step, payload)
    session.is_broken = True
    assert not token.fits(step, payload)


def test_what_is_not_recorded_yet_is_left_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    session = bench.session()
    bench.compute(session, 0, TOKENS[:7])
    token = NextToken(session, bench.runner, max_positions=None)
    assert token.compute(bench.step(7, TOKENS[7:8])[1]) is None
    assert not session.is_broken
    assert session.ledger.num_columns == 7
    bench.compute(session, 7, TOKENS[7:8])
    bench.compute(session, 7, TOKENS[7:8])
    session.pages.truncate([7])
    session.ledger.crop(7)
    assert token.compute(bench.step(7, TOKENS[7:8])[1]) is not None


def test_a_computation_that_fails_leaves_a_session_that_can_not_go_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    session = bench.session()
    bench.compute(session, 0, TOKENS[:6])
    bench.compute(session, 6, TOKENS[6:7])
    token = NextToken(session, bench.runner, max_positions=None)
    session.pages.close()  # so that the trace finds no pages
    with pytest.raises(IndexError):
        token.compute(bench.step(7, TOKENS[7:8])[1])
    assert session.is_broken


def test_a_server_gives_the_same_tokens_by_both_ways(checkpoint: Path) -> None:
    """Positions that go on are what they would be anyway, and a step that names them goes the general way."""

    async def steps(session: Session, *, has_positions: bool) -> list[torch.Tensor]:
        outputs = await session.step([TOKENS[:5]])
        for past in range(5, 30):
            runs = {"position_runs": (((past, 1),),)} if has_positions else {}
            outputs += await session.step([TOKENS[past : past + 1]], **runs)
        outputs += await session.step([TOKENS[20:21]], keep=20)  # and from where it was
        outputs += await session.step([TOKENS[21:22]])
        return outputs

    async def run() -> None:
        async with served(checkpoint) as client:
            general = await steps(await client.open(), has_positions=True)
        async with served(checkpoint) as client:
            short = await steps(await client.open(), has_positions=False)
            assert client.server.num_sessions == 1
        assert all(torch.equal(*pair) for pair in zip(general, short, strict=True))

    run_clean(run())
