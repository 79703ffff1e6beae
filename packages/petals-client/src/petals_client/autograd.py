"""Remote blocks as a function that torch can differentiate once.

Letters: N tokens of all rows, B blocks, R rows, P prompt tokens of a row, H hidden size, V values of the client's own
low-rank matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.chain import Chain
from petals_client.packing import PositionRuns
from petals_core.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteCall:
    """Which blocks compute which rows."""

    chain: Chain
    start: int
    end: int
    row_tokens: tuple[int, ...]
    position_runs: PositionRuns | None
    adaptation: Adaptation | None = None


def run_blocks(hidden: Tensor, prompts: Tensor | None, values: Tensor | None, call: RemoteCall) -> Tensor:
    """Run packed states [N, H] through remote blocks, in the same dtype on the CPU, differentiably where asked for.

    ``prompts`` [B, 1 or R, P, H] are on the CPU and in the same dtype. ``values`` [V] are those of
    ``call.adaptation.tuned`` for these blocks, as what gradients flow to.

    Raises:
        PetalsError: no chain could do it.
    """
    wants_gradient = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (hidden, prompts, values)
    )
    if wants_gradient:
        output: Tensor = _RemoteBlocks.apply(hidden, prompts, values, call)
        return output
    if prompts is None and call.adaptation is None:
        return call.chain.forward(
            hidden.detach(),
            start=call.start,
            end=call.end,
            row_tokens=call.row_tokens,
            position_runs=call.position_runs,
        )
    return _forward(hidden, prompts, call, keeps_graphs=False)[0]


def _forward(
    hidden: Tensor, prompts: Tensor | None, call: RemoteCall, *, keeps_graphs: bool
) -> tuple[Tensor, Any, list[Tensor]]:
    return call.chain.forward_for_training(
        hidden.detach(),
        None if prompts is None else prompts.detach(),
        start=call.start,
        end=call.end,
        row_tokens=call.row_tokens,
        position_runs=call.position_runs,
        keeps_graphs=keeps_graphs,
        adaptation=call.adaptation,
    )


class _RemoteBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, prompts: Tensor | None, values: Tensor | None, call: RemoteCall) -> Tensor:
        output, trace, inputs = _forward(hidden, prompts, call, keeps_graphs=True)
        # Saved as tensors, so that torch frees them with the graph.
        ctx.save_for_backward(hidden, prompts, values, *inputs)
        ctx.chain = call.chain
        ctx.trace = trace
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        hidden, prompts, values, *inputs = ctx.saved_tensors
        with torch.no_grad():
            results = ctx.chain.backward(
                ctx.trace, inputs, None if prompts is None else prompts.detach(), gradient.detach()
            )
        if torch.is_grad_enabled():  # with create_graph=True
            results = tuple(
                None if result is None else _OnlyOnce.apply(result, hidden, prompts, values, gradient)
                for result in results
            )
        return *results, None


class _OnlyOnce(torch.autograd.Function):
    """Passes a gradient on and ties it to what it depends on, so that differentiating it is refused, not wrong."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor | None) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise InvalidRequestError(
            "remote blocks can be differentiated once, not twice: leave out create_graph=True, "
            "or take the gradient's gradient with respect to something behind the blocks"
        )
