"""Gradients stay the same when servers fail, forget graphs, or share the work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petals_client import AutoDistributedModelForCausalLM, ClientOptions, RemoteSequential
from petals_core.errors import MissingBlocksError, PetalsError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_server.config import ServerLimits
from petals_server.graphs import GraphStore

NUM_BLOCKS = 6
WIDTH = 64


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama")


@pytest.fixture(scope="module")
def span(folder: Path) -> Span:
    """The blocks as the local model has them."""
    return load_span(Checkpoint.open(folder), 0, NUM_BLOCKS)


@pytest.fixture
def connect(folder: Path) -> Iterator[Callable[..., RemoteSequential]]:
    """Make remote blocks of a swarm, with options."""
    models: list[Any] = []

    def make(swarm: Any, **settings: Any) -> RemoteSequential:
        options = ClientOptions.make(initial_peers=swarm.initial_peers, **settings)
        models.append(AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[], options=options))
        blocks = models[-1].remote_blocks
        assert isinstance(blocks, RemoteSequential)
        return blocks

    yield make
    for model in models:
        model.close()


def graphs_of(server: Any) -> GraphStore:
    store = server.holding.handler.training.graphs
    assert isinstance(store, GraphStore)
    return store


def inputs(rows: int = 4, tokens: int = 6, prompt_rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and prompts that want gradients, and weights for the outputs."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, tokens, WIDTH, generator=generator).requires_grad_()
    prompts = torch.randn(NUM_BLOCKS, prompt_rows, 2, WIDTH, generator=generator).requires_grad_()
    return hidden, prompts, torch.randn(rows, tokens, WIDTH, generator=generator)


def local_gradients(span: Span, hidden: Tensor, prompts: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    states = hidden
    for index in range(NUM_BLOCKS):
        states = torch.cat([states[:, :2] + prompts[index], states[:, 2:]], dim=1)
        states = span.slice(index, index + 1)(states)
    return torch.autograd.grad((states * weight).sum(), [hidden, prompts])


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for each, wanted in zip(actual, expected, strict=True):
        assert float((each - wanted).norm()) <= 1e-5 * float(wanted.norm())


def run(blocks: RemoteSequential, hidden: Tensor, prompts: Tensor) -> Tensor:
    output = blocks(hidden, prompts=prompts)
    assert isinstance(output, Tensor)
    return output


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_server_fails_between_forward_and_backward(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., RemoteSequential]
) -> None:
    swarm = new_swarm()
    for start, end in ((0, 2), (2, 6)):
        swarm.add(folder, start, end)
    blocks = connect(swarm)
    hidden, prompts, weight = inputs()
    loss = (run(blocks, hidden, prompts) * weight).sum()
    # Those that take over have other spans.
    for start, end in ((1, 4), (4, 6), (0, 1), (1, 2)):
        swarm.add(folder, start, end)
    for server in swarm.servers[:2]:
        swarm.remove(server)
    blocks.chain.run(lambda known: known.directory.refresh())  # type: ignore[attr-defined]
    assert_same(torch.autograd.grad(loss, [hidden, prompts]), local_gradients(span, hidden, prompts, weight))


def test_a_server_fails_in_the_forward(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., RemoteSequential]
) -> None:
    swarm = new_swarm()
    first = swarm.add(folder, 0, 6)
    blocks = connect(swarm)
    hidden, prompts, weight = inputs()
    run(blocks, hidden, prompts)
    swarm.add(folder, 0, 6)
    swarm.remove(first)
    loss = (run(blocks, hidden, prompts) * weight).sum()
    assert_same(torch.autograd.grad(loss, [hidden, prompts]), local_gradients(span, hidden, prompts, weight))


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_a_server_that_hangs_is_replaced(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., RemoteSequential], moment: str
) -> None:
    swarm = new_swarm()
    hanging = swarm.add(folder, 0, 6)
    blocks = connect(swarm, step_timeout_s=1.0)
    hidden, prompts, weight = inputs()
    entered, release = threading.Event(), threading.Event()

    def hang() -> Any:
        holding = swarm.start(hanging.holding.engine.call(lambda: (entered.set(), release.wait())))
        entered.wait()
        swarm.add(folder, 0, 6)
        blocks.chain.run(lambda known: known.directory.refresh())  # type: ignore[attr-defined]
        return holding

    holding = None
    try:
        run(blocks, hidden, prompts)
        if moment == "forward":
            holding = hang()
        loss = (run(blocks, hidden, prompts) * weight).sum()
        holding = holding or hang()
        assert_same(torch.autograd.grad(loss, [hidden, prompts]), local_gradients(span, hidden, prompts, weight))
    finally:
        release.set()
        if holding is not None:
            holding.result()


def test_nobody_is_left(new_swarm: Any, folder: Path, connect: Callable[..., RemoteSequential]) -> None:
    swarm = new_swarm()
    server = swarm.add(folder, 0, 6)
    blocks = connect(swarm, recovery_timeout_s=0.0)
    hidden, prompts, _ = inputs()
    loss = run(blocks, hidden, prompts).sum()
    swarm.remove(server)
    with pytest.raises(PetalsError) as caught:
        torch.autograd.grad(loss, hidden)
    assert isinstance(caught.value, MissingBlocksError) or "failed" in caught.value.message


def test_the_loss_curve_of_a_swarm_whose_servers_are_killed(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., RemoteSequential]
) -> None:
    def tune(run_blocks: Callable[[Tensor], Tensor], disturb: Callable[[int], None]) -> list[float]:
        """Eight steps; ``disturb`` is called between forward and backward."""
        hidden, _, weight = inputs()
        states = hidden.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([states], lr=0.05)
        losses = []
        for step in range(8):
            loss = (run_blocks(states) - weight).square().mean()
            disturb(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    swarm = new_swarm()
    for start, end in ((0, 3), (3, 6), (0, 3), (3, 6)):
        swarm.add(folder, start, end)
    blocks = connect(swarm)

    def kill(step: int) -> None:
        if step in (2, 5):
            in_use = [server for server in swarm.servers if len(graphs_of(server))]
            spans = [server.model.span.start for server in swarm.servers]
            swarm.remove(next(server for server in in_use if spans.count(server.model.span.start) > 1))

    disturbed = tune(lambda states: blocks(states), kill)  # type: ignore[arg-type,return-value]
    undisturbed = tune(lambda states: span(states), lambda step: None)
    assert disturbed == pytest.approx(undisturbed, rel=1e-4)
    assert undisturbed[-1] < 0.9 * undisturbed[0]


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_a_backward_uses_the_graph_and_frees_it(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., RemoteSequential]
) -> None:
    swarm = new_swarm()
    servers = [swarm.add(folder, 0, 4), swarm.add(folder, 4, 6)]
    blocks = connect(swarm)
    hidden, prompts, weight = inputs()
    loss = (run(blocks, hidden, prompts) * weight).sum()
    assert [len(graphs_of(server)) for server in servers] == [1, 1]
    assert all(graphs_of(server).num_bytes > hidden.nbytes for server in servers)
    assert_same(
        torch.autograd.grad(loss, [hidden, prompts], retain_graph=True), local_gradients(span, hidden, prompts, weight)
    )
    assert [(len(graphs_of(server)), graphs_of(server).num_bytes) for server in servers] == [(0, 0), (0, 0)]
    # It is used up, so the second time computes anew.
    assert_same(torch.autograd.grad(loss, [hidden, prompts]), local_gradients(span, hidden, prompts, weight))


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(ServerLimits(max_graph_bytes=0), id="no memory"),
        pytest.param(ServerLimits(max_graph_bytes=300_000), id="memory for some rows"),
        pytest.param(ServerLimits(max_graph_s=0.0), id="expired"),
        pytest.param(ServerLimits(max_turn_tokens=8), id="row by row"),
        pytest.param(ServerLimits(max_turn_tokens=8, max_graph_bytes=0), id="row by row without memory"),
    ],
)
@pytest.mark.parametrize("prompt_rows", [1, 4])
def test_graphs_that_do_not_last(
    new_swarm: Any,
    folder: Path,
    span: Span,
    connect: Callable[..., RemoteSequential],
    limits: ServerLimits,
    prompt_rows: int,
) -> None:
    swarm = new_swarm()
    server = swarm.add(folder, 0, 6, limits=limits)
    blocks = connect(swarm, micro_batch_tokens=12)
    hidden, prompts, weight = inputs(prompt_rows=prompt_rows)
    loss = (run(blocks, hidden, prompts) * weight).sum()
    assert graphs_of(server).num_bytes <= limits.max_graph_bytes
    assert_same(torch.autograd.grad(loss, [hidden, prompts]), local_gradients(span, hidden, prompts, weight))


# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_rows", [1, 4])
def test_micro_batches_go_through_all_chains(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., RemoteSequential], prompt_rows: int
) -> None:
    swarm = new_swarm()
    for start, end in ((0, 6), (0, 3), (3, 6)):
        swarm.add(folder, start, end)
    blocks = connect(swarm, micro_batch_tokens=64, max_tokens_in_flight=128)
    hidden, prompts, weight = inputs(rows=4, tokens=64, prompt_rows=prompt_rows)
    _, trace, _ = blocks.chain.forward_for_training(
        hidden.detach().view(-1, WIDTH),
        prompts.detach(),
        start=0,
        end=6,
        row_tokens=(64,) * 4,
        position_runs=None,
        keeps_graphs=True,
    )
    assert len(trace.parts) == 4
    assert {leg.hop.peer_id for part in trace.parts for leg in part.legs} == {s.peer_id for s in swarm.servers}
    loss = (run(blocks, hidden, prompts) * weight).sum()
    assert_same(torch.autograd.grad(loss, [hidden, prompts]), local_gradients(span, hidden, prompts, weight))


def test_a_row_longer_than_what_may_be_in_flight(
    new_swarm: Any, folder: Path, span: Span, connect: Callable[..., RemoteSequential]
) -> None:
    swarm = new_swarm()
    swarm.add(folder, 0, 6)
    blocks = connect(swarm, max_tokens_in_flight=4)
    hidden, prompts, weight = inputs(rows=3)
    loss = (run(blocks, hidden, prompts) * weight).sum()
    assert_same(torch.autograd.grad(loss, [hidden, prompts]), local_gradients(span, hidden, prompts, weight))
