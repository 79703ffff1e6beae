"""Linear layers of a few rows on CPUs, multiplied the other way round.

A batch of two to four sessions that decode, or one session's token with a few drafts, is bound by reading the weights
once, as a single row is. The library's product of so few rows and a large matrix takes nearly twice as long as that of
one; its product of the matrix and as few columns does not, so that is what is computed. ``tools/bench_few_rows.py``
prints what it saves; docs/benchmarks.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

MIN_ROWS: Final = 2
MAX_ROWS: Final = 4
MIN_ELEMENTS: Final = 1 << 18
"""Of a matrix; smaller ones stay in a core's cache, and copies around them would cost more than they save."""


def suits(function: Any, args: Sequence[Any]) -> bool:
    """Whether an operation is a linear layer that :func:`linear` computes faster."""
    if function is not torch.ops.aten.linear.default:
        return False
    states, weight = args[0], args[1]
    return (
        weight.device.type == "cpu"
        and weight.dtype == states.dtype == torch.float32
        and weight.numel() >= MIN_ELEMENTS
        and states.shape[-1] > 0
        and MIN_ROWS <= states.numel() // states.shape[-1] <= MAX_ROWS
    )


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``states @ weight.T + bias``, contiguous, for states [..., K] of a few rows and a weight [N, K]."""
    rows = states.reshape(-1, states.shape[-1])
    output = torch.mm(weight, rows.t()).t().contiguous()
    if bias is not None:
        output += bias
    return output.view(*states.shape[:-1], weight.shape[0])
