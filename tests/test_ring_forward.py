"""Large batches go around the ring, as steps of sessions, and come out and back as with the local model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_server.config import ServerLimits

WIDTH = 64
SPANS = ((0, 2), (2, 4), (4, 6))


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama")


@pytest.fixture(scope="module")
def span(folder: Path) -> Span:
    """The blocks as the local model has them."""
    return load_span(Checkpoint.open(folder), 0, 6)


@pytest.fixture
def connect(folder: Path) -> Iterator[Callable[..., Any]]:
    """Make the chain of a swarm's blocks, with options."""
    models: list[Any] = []

    def make(swarm: Any, **settings: Any) -> Any:
        options = ClientOptions.make(initial_peers=swarm.initial_peers, **settings)
        models.append(AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[], options=options))
        return models[-1].remote_blocks.chain

    yield make
    for model in models:
        model.close()


def rows_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


def compute(chain: Any, rows: list[Tensor], **changes: Any) -> tuple[list[Tensor], bool]:
    """What comes out for each row, and whether it went around the ring: then no micro-batch has a trace."""
    arguments: dict[str, Any] = {
        "start": 0,
        "end": 6,
        "row_tokens": tuple(len(row) for row in rows),
        "position_runs": None,
        "keeps_graphs": False,
        **changes,
    }
    output, trace, _ = chain.forward_for_training(torch.cat(rows), None, **arguments)
    return list(output.split([len(row) for row in rows])), not trace.parts


@torch.no_grad()
def assert_same(outputs: list[Tensor], rows: list[Tensor], span: Span) -> None:
    for output, row in zip(outputs, rows, strict=True):
        if len(row):
            expected = span(row[None])[0]
            assert float((output - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param((8,) * 16, id="rows of one length"),
        pytest.param((3, 1, 8, 2, 7, 0, 5, 5, 8, 8, 1, 6, 4, 8, 3, 7, 2), id="rows of different lengths"),
        pytest.param((61,), id="one long row"),
        pytest.param((5, 40, 3, 29), id="long and short rows"),
    ],
)
def test_a_batch_goes_around_the_ring(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., Any], lengths: tuple[int, ...]
) -> None:
    swarm = new_swarm()
    for start, end in SPANS:
        swarm.add(folder, start, end)
    rows = rows_of(*lengths)
    outputs, was_around = compute(connect(swarm, micro_batch_tokens=10), rows)
    assert was_around
    assert_same(outputs, rows, span)
    swarm.wait_for_sessions(0)


def test_several_chains_share_a_batch(new_swarm: Any, folder: Path, span: Span, connect: Callable[..., Any]) -> None:
    swarm = new_swarm()
    for start, end in (*SPANS, (0, 3), (3, 6)):
        swarm.add(folder, start, end)
    rows = rows_of(*(8,) * 96)
    # More than two parts for each server of however many chains, or the ring would not pay; little may be under way,
    # so that each takes several turns.
    outputs, was_around = compute(connect(swarm, micro_batch_tokens=16, max_tokens_in_flight=64), rows)
    assert was_around
    assert_same(outputs, rows, span)


def test_few_parts_are_carried(new_swarm: Any, folder: Path, span: Span, connect: Callable[..., Any]) -> None:
    swarm = new_swarm()
    for start, end in SPANS:
        swarm.add(folder, start, end)
    rows = rows_of(8, 8)
    outputs, was_around = compute(connect(swarm, micro_batch_tokens=10), rows)
    assert not was_around
    assert_same(outputs, rows, span)


@pytest.mark.parametrize(("cache_tokens", "goes_around"), [(768, True), (256, False)])
def test_few_parts_of_many_bytes_go_around_the_ring_where_there_is_room(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., Any], cache_tokens: int, goes_around: bool
) -> None:
    swarm = new_swarm()
    for start, end in SPANS:
        swarm.add(folder, start, end, cache_tokens=cache_tokens)
    rows = rows_of(512)
    outputs, was_around = compute(connect(swarm), rows)
    assert was_around == goes_around
    assert_same(outputs, rows, span)


@pytest.mark.parametrize("event", ["nothing", "one server leaves", "graphs expire"])
def test_gradients_of_a_batch_that_went_around(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., Any], event: str
) -> None:
    swarm = new_swarm()
    servers = [
        swarm.add(folder, start, end, limits=ServerLimits(max_graph_s=0.01 if event == "graphs expire" else 120.0))
        for start, end in SPANS
    ]
    chain = connect(swarm, micro_batch_tokens=10)
    rows = rows_of(3, 8, 2, 7, 5, 5, 8, 8, 6, 4, 8, 3, 7)
    output, trace, inputs = chain.forward_for_training(
        torch.cat(rows),
        None,
        start=0,
        end=6,
        row_tokens=tuple(map(len, rows)),
        position_runs=None,
        keeps_graphs=True,
    )
    assert [[leg.has_input for leg in part.legs] for part in trace.parts] == [[True, False, False]] * len(trace.parts)
    assert len(inputs) == len(trace.parts)
    swarm.wait_for_sessions(0)
    if event == "one server leaves":
        swarm.add(folder, 1, 5)
        swarm.remove(servers[1])
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    of_hidden, _, _ = chain.backward(trace, inputs, None, gradient)
    start = 0
    for row in rows:
        place = slice(start, start + len(row))
        leaf = row[None].clone().requires_grad_()
        local = span(leaf)
        assert float((output[place] - local[0].detach()).norm()) <= 1e-5 * float(local.detach().norm())
        (expected,) = torch.autograd.grad(local, leaf, gradient[place][None])
        assert float((of_hidden[place] - expected[0]).norm()) <= 1e-5 * float(expected.norm())
        start += len(row)


def test_a_batch_is_carried_where_no_session_is_to_be_had(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., Any]
) -> None:
    swarm = new_swarm()
    for start, end in SPANS:
        swarm.add(folder, start, end, cache_tokens=32)
    rows = rows_of(*(64,) * 3)
    outputs, was_around = compute(connect(swarm, micro_batch_tokens=16, open_timeout_s=0.5), rows)
    assert not was_around
    assert_same(outputs, rows, span)


def test_a_training_forward_is_carried_where_no_session_is_to_be_had(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., Any]
) -> None:
    """Then what went into each server is known, as a failover in the backward wants it."""
    swarm = new_swarm()
    for start, end in SPANS:
        swarm.add(folder, start, end, limits=ServerLimits(max_sessions_per_peer=0))
    rows = rows_of(*(8,) * 16)
    output, trace, inputs = connect(swarm, micro_batch_tokens=16, open_timeout_s=0.5).forward_for_training(
        torch.cat(rows), None, start=0, end=6, row_tokens=(8,) * 16, position_runs=None, keeps_graphs=True
    )
    assert all(leg.has_input for part in trace.parts for leg in part.legs)
    assert len(inputs) == len(SPANS) * len(trace.parts)
    assert_same(list(output.split(8)), rows, span)


def test_a_server_that_hangs_is_replaced(new_swarm: Any, folder: Path, span: Span, connect: Callable[..., Any]) -> None:
    swarm = new_swarm()
    _, hanging, _ = [swarm.add(folder, start, end) for start, end in SPANS]
    chain = connect(swarm, micro_batch_tokens=10, step_timeout_s=1.0)
    rows = rows_of(*(8,) * 16)
    compute(chain, rows)
    entered, release = threading.Event(), threading.Event()
    holding = swarm.start(hanging.holding.engine.call(lambda: (entered.set(), release.wait())))
    try:
        entered.wait()
        swarm.add(folder, 2, 4)
        chain.run(lambda known: known.directory.refresh())
        outputs, _ = compute(chain, rows)
    finally:
        release.set()
        holding.result()
    assert_same(outputs, rows, span)
