"""Linear layers by oneDNN."""

from __future__ import annotations

import pytest
import torch

from petals_server.execution import linear
from petals_server.execution.linear import Linear
from petals_server.execution.packing import Packing


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
