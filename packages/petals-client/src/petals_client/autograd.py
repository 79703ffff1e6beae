"""Remote blocks as a function that torch can differentiate once.

Letters: N tokens of all rows, B blocks, R rows, P prompt tokens of a row, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def run_blocks(hidden: Tensor, prompts: Tensor | None, call: RemoteCall) -> Tensor:
    """Run packed states [N, H] through remote blocks, in the same dtype on the CPU, differentiably where asked for.

    ``prompts`` [B, 1 or R, P, H] are on the CPU and in the same dtype.

    Raises:
        PetalsError: no chain could do it.
    """
    wants_gradient = torch.is_grad_enabled() and (
        hidden.requires_grad or (prompts is not None and prompts.requires_grad)
    )
    if wants_gradient:
        output: Tensor = _RemoteBlocks.apply(hidden, prompts, call)
        return output
    if prompts is None:
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
    )


class _RemoteBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, prompts: Tensor | None, call: RemoteCall) -> Tensor:
        output, trace, inputs = _forward(hidden, prompts, call, keeps_graphs=True)
        # Saved as tensors, so that torch frees them with the graph.
        ctx.save_for_backward(hidden, prompts, *inputs)
        ctx.chain = call.chain
        ctx.trace = trace
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        hidden, prompts, *inputs = ctx.saved_tensors
        with torch.no_grad():
            of_hidden, of_prompts = ctx.chain.backward(
                ctx.trace, inputs, None if prompts is None else prompts.detach(), gradient.detach()
            )
        if torch.is_grad_enabled():  # with create_graph=True
            of_hidden, of_prompts = (
                None if result is None else _OnlyOnce.apply(result, hidden, prompts, gradient)
                for result in (of_hidden, of_prompts)
            )
        return of_hidden, of_prompts, None


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
