"""Any interleaving of sessions gives each what it gets alone: scheduler, pages and the device's part together."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petals_core.errors import CacheLostError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_core.tensors.codec import decode, encode
from petals_core.testing.factories import make_checkpoint
from petals_server.cache.pages import CachePages, plan_groups
from petals_server.cache.tensors import CacheTensors
from petals_server.execution.probe import Form, find_layout
from petals_server.execution.session import SessionState
from petals_server.execution.states import PackedStates
from petals_server.execution.steps import StepRunner, StepWork
from petals_server.scheduling.pace import Pace
from petals_server.scheduling.plan import Plan
from petals_server.scheduling.scheduler import Scheduler
from petals_server.scheduling.shares import Shares
from petals_server.threads import ThreadPlan

FORMS = {
    "llama": Form.PACKED,
    "mistral": Form.PACKED,
    "gemma2": Form.PACKED,
    "gpt_oss": Form.PACKED,
    "deepseek_v3": Form.PACKED,
    "bloom": Form.PADDED,
}
HIDDEN_SIZE = 64
NUM_TOKENS = 640
"""In the cache: few enough for sessions to wait for each other's pages."""
THREADS = ThreadPlan(decode=1, bulk=1, decode_tokens_per_s=100, bulk_tokens_per_s=100)


@functools.cache
def span_of(family: str) -> Span:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), family, num_blocks=2)
        return load_span(Checkpoint.open(folder), 0, 2)


@functools.cache
def vocabulary() -> torch.Tensor:
    """Rows that stand for tokens: the next one is that with the largest product."""
    return torch.randn(50, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))


@dataclass(slots=True, kw_only=True, eq=False)
class Client:
    """A session and what it has sent."""

    session: SessionState
    rows: list[torch.Tensor]
    columns: int = 0
    work: StepWork | None = None
    sent: list[torch.Tensor] = field(default_factory=list)
    num_seen: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one client does in a round."""

    client: int
    counts: tuple[int, int]
    keep: float
    """Of its columns."""
    order: tuple[int, int] | None
    cancels: bool
    closes: bool


STEPS = st.builds(
    Step,
    client=st.integers(0, 3),
    counts=st.sampled_from([(1, 1), (1, 1), (1, 1), (3, 3), (17, 40), (0, 2), (5, 0), (30, 30)]),
    keep=st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5, 0.0]),
    order=st.sampled_from([None, None, (1, 0), (0, 0)]),
    cancels=st.sampled_from([False] * 9 + [True]),
    closes=st.sampled_from([False] * 9 + [True]),
)


class Server:
    """The engine without its threads: turns are computed where the test asks for them."""

    def __init__(self, family: str) -> None:
        self.span = span_of(family)
        layout = find_layout(self.span)
        assert layout.form is FORMS[family]
        windows = [kind.window for kind in layout.kinds]
        self.pages = CachePages(plan_groups(windows, num_tokens=NUM_TOKENS, page_tokens=4), page_tokens=4)
        cache = CacheTensors(layout.kinds, self.pages, dtype=torch.float32, device=torch.device("cpu"))
        for tensor in (*cache.keys_SGD, *cache.values_SGD):
            tensor[4:] = torch.nan  # what nobody wrote must not be read
        self.runner = StepRunner(self.span, cache, first_layer=0, form=layout.form, threads=THREADS, with_replay=True)
        self.scheduler = Scheduler(Shares(), Pace(decode_tokens_per_s=20, bulk_tokens_per_s=400, max_turn_tokens=24))
        self.clients: dict[int, Client] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.now_s = 0.0
        self.num_checked = 0

    def client(self, number: int) -> Client:
        if number not in self.clients:
            session = SessionState(self.span, self.pages, num_rows=2, max_length=400)
            self.clients[number] = Client(session=session, rows=[torch.empty(0, HIDDEN_SIZE)] * 2)
        return self.clients[number]

    def close(self, number: int) -> None:
        client = self.clients.pop(number, None)
        if client is not None:
            if client.work is not None:
                self.scheduler.remove(client.work)
            self.scheduler.pace.forget(client.session)
            client.session.close()

    def send(self, step: Step) -> None:
        client = self.client(step.client)
        if client.work is not None:
            return
        ledger = client.session.ledger
        keep = min(ledger.num_columns, round(step.keep * ledger.num_columns))
        lengths = ledger.count_within(keep)
        if keep + max(step.counts) > 150:
            return
        rows = [row[:length] for row, length in zip(client.rows, lengths, strict=True)]
        if step.order is not None:
            rows = [rows[row] for row in step.order]
        client.sent = [torch.randn(count, HIDDEN_SIZE, generator=self.generator) for count in step.counts]
        client.rows = [torch.cat([row, new]) for row, new in zip(rows, client.sent, strict=True)]
        spec, buffers = encode(torch.cat(client.sent))
        client.work = StepWork(
            client.session,
            self.runner,
            PackedStates(spec=spec, payload=memoryview(b"".join(buffers)), row_tokens=step.counts, position_runs=None),
            keep=keep,
            row_order=step.order,
            deadline_s=1e9,
            max_turn_tokens=16,
        )
        client.work.prepare()
        self.scheduler.add(client.work, self.now_s)

    def turn(self) -> bool:
        """Compute a turn; False if there is none."""
        self.now_s += 10
        plan = self.scheduler.plan(self.now_s)
        for request, error in self.scheduler.failures:
            assert isinstance(error, CacheLostError)
            self.close(next(number for number, client in self.clients.items() if client.work is request))
        self.scheduler.failures.clear()
        if not isinstance(plan, Plan):
            return False
        self.runner.run(plan.parts)
        for request in self.scheduler.absorb(plan, 0.1, self.now_s):
            client = next(client for client in self.clients.values() if client.work is request)
            self.check(client)
        return True

    def check(self, client: Client) -> None:
        work, client.work = client.work, None
        assert work is not None
        (result,) = work.result()
        output = decode(result.spec, memoryview(b"".join(result.buffers)))
        start = 0
        for row, new in zip(client.rows, client.sent, strict=True):
            if not len(new):
                continue
            actual, start = output[start : start + len(new)], start + len(new)
            with torch.inference_mode():
                expected = self.span(row[None])[0][-len(new) :]
            assert (actual - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
            assert torch.equal((actual @ vocabulary().T).argmax(1), (expected @ vocabulary().T).argmax(1))
            self.num_checked += 1
        assert not client.session.is_broken


@pytest.mark.parametrize("family", FORMS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(rounds=st.lists(st.tuples(st.lists(STEPS, min_size=1, max_size=4), st.integers(1, 4)), min_size=4, max_size=12))
def test_any_interleaving_gives_each_session_what_it_gets_alone(family: str, rounds: Any) -> None:
    server = Server(family)
    for steps, num_turns in rounds:
        for step in steps:
            server.send(step)
            if step.closes or (step.cancels and server.client(step.client).work is not None):
                server.close(step.client)
        for _ in range(num_turns):
            server.turn()
        for pool in server.pages.pools:
            assert pool.num_free + pool.num_held == pool.num_pages
    for _ in range(400):
        if not any(client.work for client in server.clients.values()) or not server.turn():
            break
    for number in list(server.clients):
        if server.clients[number].work is not None:  # it waits for pages that the others hold
            assert server.clients[number].work.is_blocked
        server.close(number)
    assert server.pages.num_held == 0
    assert len(server.scheduler) == 0


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_what_a_session_leaves_in_its_pages_reaches_nobody(family: str) -> None:
    """A session fills every page with NaN and infinity; those that get its pages see nothing of it."""
    server = Server(family)
    with torch.inference_mode():
        for tensor in (*server.runner.cache.keys_SGD, *server.runner.cache.values_SGD):
            tensor[4:] = torch.inf
    for number, counts in enumerate([(17, 40), (1, 1), (30, 30), (0, 2)] * 2):
        step = Step(client=number, counts=counts, keep=1.0, order=None, cancels=False, closes=False)
        server.send(step)
    while server.turn():
        pass
    assert server.num_checked == 14
    for number in range(8):
        server.send(Step(client=number, counts=(1, 1), keep=0.5, order=(1, 1), cancels=False, closes=False))
    while server.turn():
        pass
    assert server.num_checked == 30
