"""Linear layers of a few rows."""

from __future__ import annotations

import pytest
import torch

from petals_server.execution import few_rows

LINEAR = torch.ops.aten.linear.default


@pytest.mark.parametrize("shape", [(2,), (1, 3), (4, 1), (1, 1, 2)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_result_is_that_of_a_linear_layer(shape: tuple[int, ...], has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(*shape, 512, generator=generator)
    weight = torch.randn(600, 512, generator=generator)
    bias = torch.randn(600, generator=generator) if has_bias else None
    assert few_rows.suits(LINEAR, (states, weight, bias))
    output = few_rows.linear(states, weight, bias)
    torch.testing.assert_close(output, torch.nn.functional.linear(states, weight, bias), rtol=1e-5, atol=1e-4)
    assert output.is_contiguous()


@pytest.mark.parametrize(
    ("rows", "weight", "dtype"),
    [
        (1, (600, 512), torch.float32),
        (5, (600, 512), torch.float32),
        (0, (600, 512), torch.float32),
        (3, (60, 512), torch.float32),
        (3, (600, 512), torch.bfloat16),
    ],
)
def test_other_layers_are_left_alone(rows: int, weight: tuple[int, int], dtype: torch.dtype) -> None:
    assert not few_rows.suits(LINEAR, (torch.zeros(rows, 512, dtype=dtype), torch.zeros(*weight, dtype=dtype)))


def test_other_operations_are_left_alone() -> None:
    assert not few_rows.suits(torch.ops.aten.mm.default, (torch.zeros(2, 512), torch.zeros(512, 600)))
