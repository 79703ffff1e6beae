"""Deep prompts: what is added, before each block, to the states of the first tokens of every row.

Letters: R rows, N columns of a batch, B blocks, P prompt tokens of a row, H hidden size.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from petals_core.models.span import Span
from petals_core.tensors.codec import TensorSpec, decode


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTensor:
    """A tensor as it came from a client, checked but not yet decoded."""

    spec: TensorSpec
    payload: memoryview

    def decode(self, span: Span) -> torch.Tensor:
        """On the span's device and in its dtype; raises ``ProtocolError``."""
        return decode(self.spec, self.payload).to(device=span.device, dtype=span.dtype)


@contextmanager
def prompted(
    span: Span, prompts_BRPH: torch.Tensor, row_tokens: Sequence[int], row_lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """Let each block of the span see the states of each row's first P tokens with its own prompts added.

    The batch is left-padded: a row has ``row_tokens`` tokens behind ``row_lengths`` earlier ones (None: none).
    """
    add = _adder(prompts_BRPH, row_tokens, row_lengths or [0] * len(row_tokens))

    with nullcontext() if add is None else _hooked(span, lambda states, index: add(states, prompts_BRPH[index])):
        yield


@contextmanager
def _hooked(span: Span, add: Callable[[torch.Tensor, int], torch.Tensor]) -> Iterator[None]:
    """Let ``add`` change the states on their way into each block, given the block's number in the span."""

    def hook(
        block: object, args: tuple[Any, ...], kwargs: dict[str, Any], *, index: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (add(args[0], index), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": add(kwargs["hidden_states"], index)}

    with ExitStack() as stack:
        for index, block in enumerate(span.blocks):
            handle = block.register_forward_pre_hook(functools.partial(hook, index=index), with_kwargs=True)
            stack.callback(handle.remove)
        yield


_Add = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From states [R, N, H] and a block's prompts [1 or R, P, H] to states with the prompts added."""


def _adder(prompts_BRPH: torch.Tensor, row_tokens: Sequence[int], row_lengths: Sequence[int]) -> _Add | None:
    """How prompts are added; None if no token of the batch is among its row's first P."""
    num_prompts, num_columns = prompts_BRPH.shape[2], max(row_tokens)
    counts = [min(max(num_prompts - length, 0), count) for length, count in zip(row_lengths, row_tokens, strict=True)]
    if not any(counts):
        return None
    if len({*row_tokens}) == 1 and len({*row_lengths}) == 1:
        first, count = row_lengths[0], counts[0]

        def add_to_all(hidden_RNH: torch.Tensor, prompts_RPH: torch.Tensor) -> torch.Tensor:
            head = hidden_RNH[:, :count] + prompts_RPH[:, first : first + count]
            return torch.cat([head, hidden_RNH[:, count:]], dim=1)

        return add_to_all
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    columns = [num_columns - row_tokens[row] + i for row, count in enumerate(counts) for i in range(count)]
    numbers = [row_lengths[row] + i for row, count in enumerate(counts) for i in range(count)]
    device = prompts_BRPH.device
    place = (torch.tensor(rows, device=device), torch.tensor(columns, device=device))
    row = place[0] if prompts_BRPH.shape[1] > 1 else torch.zeros_like(place[0])
    number = torch.tensor(numbers, device=device)

    def add_to_some(hidden_RNH: torch.Tensor, prompts_RPH: torch.Tensor) -> torch.Tensor:
        return hidden_RNH.index_put(place, prompts_RPH[row, number], accumulate=True)

    return add_to_some


class SessionPrompts:
    """The deep prompts [B, 1, P, H] of a session, the same for all of its rows. Used in the device's thread."""

    def __init__(self, span: Span, encoded: EncodedTensor) -> None:
        self._span = span
        self._encoded: EncodedTensor | None = encoded
        self._prompts_BRPH: torch.Tensor

    def states(self) -> torch.Tensor:
        """The prompts [B, 1, P, H]; raises ``ProtocolError`` the first time."""
        if self._encoded is not None:
            self._prompts_BRPH, self._encoded = self._encoded.decode(self._span), None
        return self._prompts_BRPH

    def added(self, row_tokens: Sequence[int], row_lengths: Sequence[int]) -> Any:
        """Context in which the span adds them to a step's tokens; raises ``ProtocolError`` the first time."""
        return prompted(self._span, self.states(), row_tokens, row_lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptedRow:
    """A row of a batch and the prompts of its session."""

    prompts: SessionPrompts
    start: int
    """Where its tokens begin among those of the batch."""
    past: int
    count: int


@contextmanager
def prompted_rows(span: Span, rows: Sequence[PromptedRow]) -> Iterator[None]:
    """Let each block see the states of rows' first tokens with their sessions' prompts added.

    The rows are some of those of a batch whose tokens are, in whatever shape, a sequence of vectors [..., H].
    """
    places: list[int] = []
    values: list[torch.Tensor] = []
    for row in rows:
        prompts_BRPH = row.prompts.states()
        count = min(prompts_BRPH.shape[2] - row.past, row.count)
        if count > 0:
            places += range(row.start, row.start + count)
            values.append(prompts_BRPH[:, 0, row.past : row.past + count])
    if not places:
        yield
        return
    values_BKH = values[0] if len(values) == 1 else torch.cat(values, dim=1)
    indices = torch.tensor(places, device=values_BKH.device)

    def add(states: torch.Tensor, index: int) -> torch.Tensor:
        return states.reshape(-1, states.shape[-1]).index_add(0, indices, values_BKH[index]).view_as(states)

    with _hooked(span, add):
        yield
