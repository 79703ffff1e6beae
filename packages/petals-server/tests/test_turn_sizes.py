"""Work that has turns of its own gives the same whatever the turns' sizes are, and whenever these change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from petals_core.identity import Identity
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_core.tensors.codec import TensorSpec, decode, encode
from petals_core.testing.factories import make_checkpoint
from petals_server.deep_prompts import EncodedTensor
from petals_server.execution.forward import ForwardWork
from petals_server.execution.linear import Linear
from petals_server.execution.packing import Packing
from petals_server.execution.states import EncodedStates, PackedStates
from petals_server.graphs import Graph, GraphStore
from petals_server.threads import ThreadPlan
from petals_server.training import BackwardWork, TrainingForwardWork, TrainingRequest
from petals_server.work import Work

THREADS = ThreadPlan(decode=1, bulk=1, decode_tokens_per_s=1, bulk_tokens_per_s=1)
OPTIONS: dict[str, Any] = {"deadline_s": 1e9, "max_turn_tokens": 512, "peer_id": Identity.ephemeral().peer_id}
ROWS = (5, 1, 9, 2, 2)
TURNS = st.lists(st.integers(1, 24), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> Span:
    return load_span(Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("sizes"), num_blocks=2)), 0, 2)


def encoded(tensor: torch.Tensor) -> tuple[TensorSpec, memoryview]:
    spec, (payload, *_) = encode(tensor)
    return spec, memoryview(payload)


def decoded(result: EncodedStates) -> torch.Tensor:
    return decode(result.spec, memoryview(b"".join(result.buffers)))


def as_input(tensor: torch.Tensor) -> EncodedTensor:
    spec, payload = encoded(tensor)
    return EncodedTensor(spec=spec, payload=payload)


def compute(work: Work[Any], turns: Sequence[int]) -> Any:
    """Let work have turns of these sizes, again and again."""
    work.prepare()
    for size in itertools.islice(itertools.cycle(turns), sum(ROWS)):
        if work.advance(min(size, work.num_tokens_left)):
            return work.result()
    raise AssertionError("more turns than tokens")


@given(TURNS)
@settings(max_examples=25)
def test_a_forward_may_be_cut_anywhere(span: Span, turns: list[int]) -> None:
    states = torch.randn(sum(ROWS), 64, generator=torch.Generator().manual_seed(0))
    spec, payload = encoded(states)
    packed = PackedStates(spec=spec, payload=payload, row_tokens=ROWS, position_runs=None)
    (result,) = compute(ForwardWork(span, THREADS, packed, **OPTIONS), turns)
    output = decoded(result)
    with torch.inference_mode():
        expected = torch.cat([span(row[None])[0] for row in states.split(ROWS)])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@given(TURNS, TURNS, st.booleans())
@settings(max_examples=15)
def test_training_may_be_cut_between_rows(
    span: Span, forward_turns: list[int], backward_turns: list[int], is_kept: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    states, gradient = (torch.randn(sum(ROWS), 64, generator=generator) for _ in range(2))
    hidden, of_output = map(as_input, (states, gradient))
    leaf = states.clone().requires_grad_()
    expected = torch.cat([span(row[None])[0] for row in leaf.split(ROWS)])
    (expected_gradient,) = torch.autograd.grad(expected, leaf, gradient)
    graph = Graph(peer_id=OPTIONS["peer_id"])
    store = GraphStore(budget_bytes=1 << 30 if is_kept else 0, lifetime_s=60)
    forward = TrainingForwardWork(
        span,
        THREADS,
        TrainingRequest(row_tokens=ROWS, position_runs=None, hidden=hidden),
        graph=graph,
        store=store,
        **OPTIONS,
    )
    (output,) = compute(forward, forward_turns)
    assert (graph.content is not None) is is_kept
    backward = BackwardWork(
        span,
        THREADS,
        TrainingRequest(row_tokens=ROWS, position_runs=None, hidden=None if is_kept else hidden, gradient=of_output),
        graph=graph.content,
        max_graph_bytes=1 << 30,
        **OPTIONS,
    )
    (result,) = compute(backward, backward_turns)
    torch.testing.assert_close(decoded(output), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded(result), expected_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_gradient_finds_weights_in_torchs_order_and_pays_for_none(is_kept: bool, tmp_path: Path) -> None:
    span = load_span(Checkpoint.open(make_checkpoint(tmp_path, num_blocks=1, hidden_size=512)), 0, 1)
    generator = torch.Generator().manual_seed(1)
    states, gradient = (torch.randn(sum(ROWS), 512, generator=generator) for _ in range(2))
    leaf = states.clone().requires_grad_()
    expected = torch.cat([span(row[None])[0] for row in leaf.split(ROWS)])
    (expected_gradient,) = torch.autograd.grad(expected, leaf, gradient)
    packing = Packing([make_linear(module) for module in span.blocks.modules() if type(module) is nn.Linear])
    graph, store = Graph(peer_id=OPTIONS["peer_id"]), GraphStore(budget_bytes=1 << 30, lifetime_s=60)
    hidden, of_output = map(as_input, (states, gradient))
    request = TrainingRequest(row_tokens=ROWS, position_runs=None, hidden=hidden)
    if is_kept:
        forward = TrainingForwardWork(span, THREADS, request, graph=graph, store=store, **OPTIONS)
        (output,) = compute(forward, [24])
        torch.testing.assert_close(decoded(output), expected.detach(), atol=1e-5, rtol=1e-5)
        assert 0 < graph.num_bytes < span.num_bytes
    backward = BackwardWork(
        span,
        THREADS,
        dataclasses.replace(request, gradient=of_output),
        graph=graph.content,
        max_graph_bytes=1 << 30,
        **OPTIONS,
    )
    (result,) = compute(backward, [24])
    torch.testing.assert_close(decoded(result), expected_gradient, atol=1e-4, rtol=1e-3)
    assert packing.is_plain


def make_linear(module: nn.Linear) -> Linear:
    """Let it be multiplied by oneDNN."""
    module.__class__ = Linear
    assert isinstance(module, Linear)
    return module
