"""Linear layers in float32 on CPUs, multiplied by oneDNN where that is faster than what torch takes by itself.

torch multiplies matrices in float32 by MKL, which uses AVX2 on processors of other makers than its own; oneDNN, which
torch brings along too, uses AVX-512 on all. Before each product oneDNN would bring the weights into an order of its
own, most of the work for a few rows: they are kept in that order (packed) while nobody asks for gradients, for which
oneDNN needs them as they were (:mod:`petals_server.execution.packing`). Sums are taken in another order than torch's,
so results differ in the last bits, as they do between batches of different sizes. ``tools/bench_linear.py`` prints what
it brings; docs/benchmarks.md has the figures.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Optional, Union, final

import torch
from torch import nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from petals_server.execution.packing import Packing

MIN_ELEMENTS: Final = 1 << 18
"""Of a weight: for smaller ones finding the kernel takes oneDNN longer than multiplying."""
MIN_LONE_ELEMENTS: Final = 1 << 20
"""Of a weight that is not packed and multiplied with a single row, where reading it takes nearly all of the time."""
OPERATION: Final[Any] = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
"""oneDNN's linear layer; None where torch comes without oneDNN."""
_MIN_GAIN: Final = 1.2
"""How many times as fast oneDNN has to be. Far from what both take where they do the same, so that a server that
starts again decides the same."""
_TRIAL_SIZE: Final = 1024
_TRIAL_ROWS: Final = 64
_NUM_TRIALS: Final = 10


def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``states @ weight.T + bias`` by oneDNN, without gradients; float32 on the CPU, [..., K], [N, K] and [N].

    The weights may be packed.
    """
    multiply = _traceable() if torch.jit.is_tracing() else OPERATION  # type: ignore[attr-defined]
    output: torch.Tensor = multiply(states, weight, bias, "none", [], "")
    return output


def suits(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether :func:`product` can multiply these, and does so faster where :func:`is_faster`."""
    if weight.is_mkldnn:  # nothing else can read it
        return True
    num_elements = weight.numel()
    if num_elements < MIN_ELEMENTS or not (weight.dtype == states.dtype == torch.float32):
        return False
    num_rows = states.numel() // weight.shape[1]
    return weight.device.type == "cpu" and num_rows >= (1 if num_elements >= MIN_LONE_ELEMENTS else 2)


@final
class Linear(nn.Linear):
    """A linear layer whose weights are not trained."""

    packing: Packing | None = None
    """By which its weights change form; None: they are in torch's order for good."""

    def __deepcopy__(self, memo: object) -> Linear:
        """Itself: parts of a span are copies of its modules, and weights that change form change for all of them."""
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 -- torch's name
        """``input @ weight.T + bias``, of shape [..., N]; gradients flow to the input."""
        weight, bias = self.weight, self.bias
        if not suits(input, weight):
            return nn.functional.linear(input, weight, bias)
        if torch.is_grad_enabled() and input.requires_grad:
            output: torch.Tensor = _Product.apply(input, weight, bias)
            return output
        return product(input, weight, bias)


@functools.cache
@torch.inference_mode()
def is_faster() -> bool:
    """Whether oneDNN multiplies clearly faster on this machine; measured once, in some milliseconds."""
    if OPERATION is None or not torch.backends.mkldnn.is_available():
        return False
    states, weight = torch.ones(_TRIAL_ROWS, _TRIAL_SIZE), torch.ones(_TRIAL_SIZE, _TRIAL_SIZE)
    candidates = (nn.functional.linear, product)
    best_s = [math.inf, math.inf]
    # Processor time, in turns: other servers that start on this machine at the same moment are not to decide it.
    for _ in range(_NUM_TRIALS):
        for index, multiply in enumerate(candidates):
            started_s = time.thread_time()
            multiply(states, weight)
            best_s[index] = min(best_s[index], time.thread_time() - started_s)
    return best_s[0] > _MIN_GAIN * best_s[1]


@functools.cache
def _traceable() -> Callable[..., Any]:
    """The operation behind a call that ``torch.jit.trace`` can hold: it knows no lists of optional numbers itself."""
    return torch.jit.script(_call)


def _call(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],  # noqa: UP045 -- the language of torch.jit.script
    name: str,
    numbers: list[Optional[Union[int, float, complex]]],  # noqa: UP007, UP045
    algorithm: str,
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, name, numbers, algorithm)


class _Product(torch.autograd.Function):
    """:func:`product` with a gradient of the states alone. Right with packed weights too, but slow."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return product(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        plain = weight.to_dense() if weight.is_mkldnn else weight
        return product(gradient, plain.t()), None, None
