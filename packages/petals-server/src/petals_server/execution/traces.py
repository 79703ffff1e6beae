"""A recorded program for the next token of one row as a single call, that runs without Python.

Nothing comes more often than this step. Its program is traced: what comes out calls the same operations in the same
order, with the places in the cache as numbers, so that results are equal to the last bit. ``torch.jit`` is deprecated:
where it is missing, or what it makes computes something else, steps are computed by the program as it is.

Letters: T tokens of the packed row, H hidden size.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn

from petals_server.cache.pages import PageRun
from petals_server.cache.tensors import CacheTensors
from petals_server.execution.batch import Batch, RowView, first_seen

_NUM_TRIALS: Final = 3
"""The first runs of a trace are watched by torch, which then changes it."""


@dataclass(frozen=True, slots=True)
class Program:
    """From hidden states [T, H], positions [T] and the batch that they are to hidden states [T, H]."""

    function: Callable[..., torch.Tensor]
    """Takes the three, and then the constants."""
    constants: tuple[torch.Tensor, ...]
    """The weights."""

    def __call__(self, hidden_TH: torch.Tensor, positions_T: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.function(hidden_TH, positions_T, batch, *self.constants)


@final
class _Traced(nn.Module):
    """What is traced. It holds the program's constants because a trace takes packed weights from modules only."""

    def __init__(self, compute: Callable[..., torch.Tensor], constants: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._compute = compute
        for index, constant in enumerate(constants):
            self.register_buffer(f"constant_{index}", constant)

    def forward(self, hidden_TH: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return self._compute(hidden_TH, numbers)


class _NumberedBatch(Batch):
    """One token of one row whose places in the cache are tensors, so that a trace holds for all places."""

    def __init__(self, cache: CacheTensors, first_layer: int, slots: dict[int, Any], views: dict[int, Any]) -> None:
        super().__init__([], cache, first_layer=first_layer)
        self.num_tokens = 1
        self._slots_T.update(slots)
        self._views.update(views)


class LoneTrace:
    """A program for one token of one row. Not for use in several threads at once."""

    def __init__(self, program: Program, num_blocks: int, hidden_TH: torch.Tensor, batch: Batch) -> None:
        """Trace ``program``, under ``inference_mode``, with a batch that it has computed from ``hidden_TH``.

        Raises:
            Exception: whatever torch has against it.
        """
        self._cache, self._first_layer = batch.cache, batch.first_layer
        self._layers = range(batch.first_layer, batch.first_layer + num_blocks)
        self._groups = tuple(dict.fromkeys(batch.cache.group_of[layer] for layer in self._layers))
        self._kinds = {batch.cache.kind_of[layer]: layer for layer in self._layers}
        """A block of each kind."""
        self._runs: tuple[PageRun, ...] | None = None
        self._bases: dict[int, int] | None = None
        """Where in each group's pool a row's first token is, or would be: of ``_runs``."""

        def compute(hidden_TH: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
            slots = {group: numbers[index : index + 1] for index, group in enumerate(self._groups, 1)}
            views = {}
            for index, kind in enumerate(self._kinds):
                at = 1 + len(self._groups) + 2 * index
                places = slice(numbers[at], numbers[at + 1])
                views[kind] = [RowView(start=0, count=1, slots=places, is_causal=False, mask=None)]
            return program(hidden_TH, numbers[:1], _NumberedBatch(self._cache, self._first_layer, slots, views))

        row = batch.rows[0]
        numbers = self._numbers(row.past, row.past, row.runs)
        if numbers is None:
            raise RuntimeError("the row's pages do not follow each other")
        self._given = torch.tensor(numbers)
        self._given_numbers = self._given.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced: Any = torch.jit.trace(
                _Traced(compute, program.constants), (hidden_TH, self._given), check_trace=False
            )
        self._function: Callable[..., torch.Tensor] = traced.forward  # the module around it looks for hooks

    def run(self, hidden_TH: torch.Tensor, position: int, past: int, runs: tuple[PageRun, ...]) -> torch.Tensor | None:
        """What the program gives for a row's token behind ``past`` others, under ``inference_mode``; None: the row's
        cache, which is in ``runs``, is in pieces."""
        numbers = self._numbers(position, past, runs)
        if numbers is None:
            return None
        self._given_numbers[:] = numbers
        return self._function(hidden_TH, self._given)

    def is_right(
        self, expected_TH: torch.Tensor, hidden_TH: torch.Tensor, positions_T: torch.Tensor, batch: Batch
    ) -> bool:
        """Whether it gives what is expected, from a cache without the new token, in each of its first runs."""
        for _ in range(_NUM_TRIALS):
            for layer in self._layers:
                slots_T = batch.slots_T(self._cache.group_of[layer])
                self._cache.keys_SGD[layer].index_fill_(0, slots_T, 0)
                self._cache.values_SGD[layer].index_fill_(0, slots_T, 0)
            output_TH = self.run(hidden_TH, int(positions_T), batch.rows[0].past, batch.rows[0].runs)
            if output_TH is None or not torch.equal(output_TH, expected_TH):
                return False
        return True

    def _numbers(self, position: int, past: int, runs: tuple[PageRun, ...]) -> list[int] | None:
        """The new token's position, where it goes in each group, and what it sees in blocks of each kind; None: pages
        that do not follow each other."""
        if runs is not self._runs:
            self._runs, self._bases = runs, self._locate(runs)
        bases = self._bases
        if bases is None:
            return None
        numbers = [position, *[base + past for base in bases.values()]]
        for layer in self._kinds.values():
            base = bases[self._cache.group_of[layer]]
            numbers += (base + first_seen(past, self._cache.kinds[layer]), base + past + 1)
        return numbers

    def _locate(self, runs: tuple[PageRun, ...]) -> dict[int, int] | None:
        bases = {}
        for group in self._groups:
            run = runs[group]
            if not run.is_consecutive:
                return None
            bases[group] = run.pages[0] * self._cache.page_tokens - run.first_token
        return bases
