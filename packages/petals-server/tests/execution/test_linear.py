"""Linear layers by oneDNN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_core.testing.factories import make_checkpoint
from petals_server.execution import linear
from petals_server.execution.linear import Linear, Packing


def make_layers(has_bias: bool, *, is_packed: bool = False, size: int = 1024) -> tuple[Linear, torch.nn.Linear]:
    """A layer of each class with the same weights, which need no gradients."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(size, 600, bias=has_bias).requires_grad_(False)
    layer = torch.nn.Linear(size, 600, bias=has_bias).requires_grad_(False)
    layer.load_state_dict(plain.state_dict())
    layer.__class__ = Linear
    assert isinstance(layer, Linear)
    if is_packed:
        Packing([layer])
    return layer, plain


def make_linear(span: Span) -> list[Linear]:
    """Let a span's layers be multiplied by oneDNN, however fast that is."""
    layers = [module for module in span.blocks.modules() if type(module) is torch.nn.Linear]
    for layer in layers:
        layer.__class__ = Linear
    return [layer for layer in layers if isinstance(layer, Linear)]


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 3), (4, 1), (2, 40), (1, 1, 2), (0,)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_layers_give_what_those_of_torch_give(shape: tuple[int, ...], has_bias: bool, is_packed: bool) -> None:
    layer, plain = make_layers(has_bias, is_packed=is_packed)
    states = torch.randn(*shape, 1024)
    output = layer(states)
    torch.testing.assert_close(output, plain(states), rtol=1e-5, atol=1e-4)
    assert output.is_contiguous()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_gradients_flow_to_the_states(has_bias: bool, is_packed: bool) -> None:
    layer, plain = make_layers(has_bias, is_packed=is_packed)
    states = torch.randn(2, 30, 1024)
    gradients = []
    for each in (layer, plain):
        own = states.clone().requires_grad_()
        each(own).square().sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


class Holder:
    """Counts how often it is told to forget."""

    def __init__(self) -> None:
        self.num_told = 0

    def forget(self) -> None:
        self.num_told += 1


def test_weights_come_back_as_they_were_and_whoever_holds_packed_ones_is_told() -> None:
    layer, plain = make_layers(True)
    small, small_plain = make_layers(True, size=64)
    packing, holder = Packing([layer, small]), Holder()
    packing.tell(holder)
    assert (layer.weight.is_mkldnn, small.weight.is_mkldnn) == (True, False)
    assert layer.weight.nbytes == plain.weight.nbytes
    packing.undo()
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(small.weight, small_plain.weight)
    assert (layer.packing, small.packing, holder.num_told) == (None, None, 1)


@pytest.mark.parametrize(
    ("rows", "weight", "dtype"),
    [
        (0, (600, 1024), torch.float32),
        (1, (600, 512), torch.float32),
        (3, (60, 512), torch.float32),
        (3, (600, 1024), torch.bfloat16),
    ],
)
def test_other_products_are_left_to_torch(rows: int, weight: tuple[int, int], dtype: torch.dtype) -> None:
    states = torch.zeros(rows, weight[1], dtype=dtype)
    assert not linear.suits(states, torch.zeros(*weight, dtype=dtype))


def test_layers_of_a_span_are_changed_where_that_is_faster(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", num_blocks=1, hidden_size=512)
    span = load_span(Checkpoint.open(tmp_path), 0, 1)
    linear.install(span)
    layers = [module for module in span.blocks.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 7
    assert {type(layer) for layer in layers} == {Linear if linear.is_faster() else torch.nn.Linear}
    assert (linear.packing_of(span) is not None) == linear.is_faster()
    assert any(layer.weight.is_mkldnn for layer in layers) == linear.is_faster()
    linear.unpack(span)
    assert linear.packing_of(span) is None
    assert not any(layer.weight.is_mkldnn for layer in layers)


def test_parts_of_a_span_have_their_weights_in_the_same_form(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", num_blocks=3, hidden_size=512)
    span, plain = (load_span(Checkpoint.open(tmp_path), 0, 3) for _ in range(2))
    packing = Packing(make_linear(span))
    part, states = span.slice(1, 3), torch.randn(1, 3, 512)
    assert linear.packing_of(part) is packing
    expected = plain.slice(1, 3)(states)
    torch.testing.assert_close(part(states), expected, rtol=1e-4, atol=1e-4)
    linear.unpack(part)
    for layer in span.blocks.modules():
        assert not (isinstance(layer, Linear) and layer.weight.is_mkldnn)
    torch.testing.assert_close(part(states), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_blocks_read_themselves_stay_in_torchs_order(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", num_blocks=2, hidden_size=512)
    span = load_span(Checkpoint.open(tmp_path), 0, 2)

    def look(module: Any, args: object) -> None:
        assert module.mlp.up_proj.weight[0].sum() != 0

    span.blocks[1].register_forward_pre_hook(look)
    linear.install(span)
    assert linear.packing_of(span) is None
    assert span(torch.zeros(1, 3, 512), cache=None).shape == (1, 3, 512)


def test_layers_of_other_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", num_blocks=1)
    span = load_span(Checkpoint.open(tmp_path), 0, 1, dtype=torch.bfloat16)
    linear.install(span)
    assert not any(isinstance(module, Linear) for module in span.blocks.modules())
