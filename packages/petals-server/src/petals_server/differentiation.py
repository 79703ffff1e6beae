"""One batch of rows through a span with a graph: deep prompts, what the graph keeps alive, and computing without it.

Weights are frozen: gradients are those of the hidden states that go in, of the prompts, and of low-rank matrices that a
client has sent.

Letters: R rows, T tokens of all rows together, N columns of a batch, B blocks, P prompt tokens of a row, H hidden size,
V values of low-rank matrices.
"""

# ruff: noqa: N803, N806, N815 -- tensors are named by their shape

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from petals_core.models.span import Span
from petals_server.columns import spread
from petals_server.deep_prompts import prompted
from petals_server.execution.states import as_mask, default_positions


class Gradients(NamedTuple):
    """Those of a chunk's inputs; None for what it was not given."""

    hidden_TH: torch.Tensor
    prompts_BRPH: torch.Tensor | None
    values_V: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkGraph:
    """A chunk's inputs, and its output with the graph that leads there."""

    hidden_TH: torch.Tensor
    prompts_BRPH: torch.Tensor | None
    values_V: torch.Tensor | None
    output_TH: torch.Tensor

    def differentiate(self, gradient_TH: torch.Tensor) -> Gradients:
        """Gradients of the inputs; frees the graph."""
        optional = (self.prompts_BRPH, self.values_V)
        inputs = [self.hidden_TH, *(each for each in optional if each is not None)]
        found = iter(torch.autograd.grad(self.output_TH, inputs, gradient_TH))
        return Gradients(next(found), *(None if each is None else next(found) for each in optional))


def compute_rows(
    span: Span,
    row_tokens: tuple[int, ...],
    hidden_TH: torch.Tensor,
    prompts_BRPH: torch.Tensor | None,
    positions_T: NDArray[np.int64] | None,
) -> torch.Tensor:
    """Rows through the span, without a cache; [T, H]. Gradients flow to hidden states and prompts."""
    num_rows, num_columns = len(row_tokens), max(row_tokens)
    is_rectangular = min(row_tokens) == num_columns
    valid_RN = spread(row_tokens)
    indices = None if is_rectangular else torch.from_numpy(np.flatnonzero(valid_RN)).to(hidden_TH.device)
    hidden_RNH = (
        hidden_TH
        if indices is None
        else hidden_TH.new_zeros(num_rows * num_columns, hidden_TH.shape[1]).index_copy(0, indices, hidden_TH)
    ).view(num_rows, num_columns, -1)
    # A mask is given with positions even where it masks nothing: without one, Transformers reads positions that start
    # anew as several sequences packed into a row.
    has_mask = positions_T is not None or not is_rectangular
    positions_RN: torch.Tensor | None = None
    if positions_T is not None:
        placed_RN = np.zeros((num_rows, num_columns), dtype=np.int64)
        placed_RN[valid_RN] = positions_T
        positions_RN = torch.from_numpy(placed_RN).to(hidden_TH.device)
    elif has_mask:
        positions_RN = default_positions(row_tokens, [0] * num_rows).to(hidden_TH.device)
    with nullcontext() if prompts_BRPH is None else prompted(span, prompts_BRPH, row_tokens):
        output_RNH = span(
            hidden_RNH,
            attention_mask=as_mask(valid_RN, span.device) if has_mask else None,
            position_ids=positions_RN,
            cache=None,
        )
    output_TH = output_RNH.reshape(num_rows * num_columns, -1)
    return output_TH if indices is None else output_TH.index_select(0, indices)


@contextmanager
def checkpointed(span: Span) -> Iterator[None]:
    """Let the graph keep what goes into each block and nothing else; backward computes the blocks again, one by one."""
    with ExitStack() as stack:
        for block in span.blocks:
            # Without the random state: nothing random is computed here.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            stack.callback(delattr, block, "forward")
        yield


class OverBudgetError(Exception):
    """A graph would take more memory than it may."""


class GraphMeter(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that a graph keeps alive while it is made: each storage once, the span's weights not at all.

    Raises:
        OverBudgetError: ``grow`` refused some bytes; raised in the midst of the forward.
    """

    def __init__(self, span: Span, grow: Callable[[int], bool], *, others_own: Iterable[torch.Tensor] = ()) -> None:
        """``others_own``: what is in memory anyway, like the span's weights."""
        self._grow = grow
        weights = [*span.model.state_dict().values(), *others_own]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in weights}
        super().__init__(self.count, _same)

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note that a tensor is kept, and return it."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._seen:
            self._seen.add(address)
            if not self._grow(storage.nbytes()):
                raise OverBudgetError
        return tensor


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
