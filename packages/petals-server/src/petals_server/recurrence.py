"""Going back in a session of blocks whose state is not one entry per token.

Keys and values are cut back to fewer columns; the state of a recurrence or convolution is a sum over all that came
before, and can't. So such a session keeps what went into its span, next to one copy of the states that is some columns
old. To go back, the copy (or, before it, the empty state) is put back, and the columns that are to stay and lie behind
it are computed again. What is kept is as much memory as one more block's keys and values would take, or less.

Letters: R rows, N columns of a chunk, H hidden size.
"""

# ruff: noqa: N815 -- tensors are named by their shape

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

States = list[torch.Tensor | None]

COPY_INTERVAL_COLUMNS: Final = 16
"""Columns that may follow the copy before another is taken. It is taken before a step, never within one, so that taking
back drafts, which are columns of the last step, computes fewer columns than these and the drafts again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Columns that went into the span together. Each row has a token in all of them or in none."""

    start: int
    """The first of its columns."""
    hidden_RNH: torch.Tensor
    row_tokens: tuple[int, ...]
    positions_RN: torch.Tensor | None
    num_orders: int = 0
    """Changes of the rows' order before it."""

    @property
    def end(self) -> int:
        return self.start + self.hidden_RNH.shape[1]

    def cut(self, end: int) -> Input:
        """Its columns before ``end``."""
        count = end - self.start
        return replace(
            self,
            hidden_RNH=self.hidden_RNH[:, :count],
            row_tokens=tuple(min(count, tokens) for tokens in self.row_tokens),
            positions_RN=None if self.positions_RN is None else self.positions_RN[:, :count],
        )

    def reordered(self, order: Sequence[int], num_orders: int) -> Input:
        """The same with row i being what row ``order[i]`` was."""
        rows = torch.tensor(order, device=self.hidden_RNH.device)
        return replace(
            self,
            hidden_RNH=self.hidden_RNH.index_select(0, rows),
            row_tokens=tuple(self.row_tokens[row] for row in order),
            positions_RN=None if self.positions_RN is None else self.positions_RN.index_select(0, rows),
            num_orders=num_orders,
        )


class RecurrentPast:
    """What a session needs to go back: its inputs, and a copy of older states."""

    def __init__(self) -> None:
        self._inputs: list[Input] = []
        self._orders: list[tuple[int, ...]] = []
        self._copy: tuple[int, int, States] | None = None
        """Columns, number of orders, and the states at that time."""

    def append(self, entry: Input) -> None:
        """Note what goes into the span."""
        self._inputs.append(replace(entry, num_orders=len(self._orders)))

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i be what row ``order[i]`` was."""
        self._orders.append(tuple(order))

    def wants_copy(self, num_columns: int, num_new: int) -> bool:
        """Whether states of ``num_columns`` columns should be copied before ``num_new`` more."""
        before = 0 if self._copy is None else self._copy[0]
        return num_columns > 0 and num_columns + num_new - before > COPY_INTERVAL_COLUMNS

    def keep_copy(self, num_columns: int, states: States) -> None:
        """Take a copy of the states behind ``num_columns`` columns instead of the one before."""
        self._copy = (num_columns, len(self._orders), states)

    def go_back(self, num_columns: int) -> tuple[int, States]:
        """Forget all columns but the first ``num_columns``.

        Returns:
            The columns of the latest states before that, and these states in the present order of rows. What
            :meth:`take_inputs` gives has then to be computed again.
        """
        while self._inputs and self._inputs[-1].start >= num_columns:
            self._inputs.pop()
        if self._inputs and self._inputs[-1].end > num_columns:
            self._inputs[-1] = self._inputs[-1].cut(num_columns)
        if self._copy is not None and self._copy[0] > num_columns:
            self._copy = None
        if self._copy is None:
            return 0, []
        columns, num_orders, states = self._copy
        order = self._order_since(num_orders)
        if order is not None:
            states = [
                None if state is None else state.index_select(0, torch.tensor(order, device=state.device))
                for state in states
            ]
            self.keep_copy(columns, states)
        return columns, states

    def take_inputs(self, num_columns: int, max_tokens: int) -> list[Input]:
        """Take out what came behind the first ``num_columns`` columns, in the present order of rows.

        Neighbours are put together up to ``max_tokens`` tokens, pads included.
        """
        taken: list[Input] = []
        while self._inputs and self._inputs[-1].start >= num_columns:
            entry = self._inputs.pop()
            order = self._order_since(entry.num_orders)
            taken.append(entry if order is None else entry.reordered(order, len(self._orders)))
        if not self._inputs and self._copy is None:
            self._orders.clear()
        groups: list[list[Input]] = []
        for entry in reversed(taken):
            if groups and _fits(groups[-1], entry, max_tokens):
                groups[-1].append(entry)
            else:
                groups.append([entry])
        return [_join(group) for group in groups]

    def _order_since(self, num_orders: int) -> tuple[int, ...] | None:
        """What all orders behind the first ``num_orders`` amount to; None: there are none."""
        later = self._orders[num_orders:]
        if not later:
            return None
        order = later[0]
        for each in later[1:]:
            order = tuple(order[row] for row in each)
        return order


def _fits(group: list[Input], entry: Input, max_tokens: int) -> bool:
    first = group[0]
    num_columns = entry.end - first.start
    return (
        num_columns * len(entry.row_tokens) <= max_tokens
        and [count > 0 for count in first.row_tokens] == [count > 0 for count in entry.row_tokens]
        and (first.positions_RN is None) == (entry.positions_RN is None)
    )


def _join(group: list[Input]) -> Input:
    first = group[0]
    if len(group) == 1:
        return first
    positions = [entry.positions_RN for entry in group if entry.positions_RN is not None]
    return replace(
        first,
        hidden_RNH=torch.cat([entry.hidden_RNH for entry in group], dim=1),
        row_tokens=tuple(map(sum, zip(*(entry.row_tokens for entry in group), strict=True))),
        positions_RN=torch.cat(positions, dim=1) if positions else None,
    )
