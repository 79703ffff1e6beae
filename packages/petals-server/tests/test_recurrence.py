"""Going back gives the states that going forth gave, checked with a state that is a sum."""

from __future__ import annotations

import random

import pytest
import torch

from petals_server.recurrence import COPY_INTERVAL_COLUMNS, Input, RecurrentPast


class Sums:
    """A session of rows whose state is the weighted sum of their tokens, next to each row's whole history."""

    def __init__(self, num_rows: int) -> None:
        self.past = RecurrentPast()
        self.state = torch.zeros(num_rows, 1)
        self.columns: list[torch.Tensor] = []
        """[R] each; nan where a row has no token."""
        self.num_computed = 0

    def expected(self) -> torch.Tensor:
        state = torch.zeros_like(self.state)
        for column in self.columns:
            state = torch.where(column.isnan(), state[:, 0], state[:, 0] * 0.9 + column)[:, None]
        return state

    def compute(self, start: int, hidden: torch.Tensor, row_tokens: tuple[int, ...]) -> None:
        self.past.append(Input(start=start, hidden_RNH=hidden, row_tokens=row_tokens, positions_RN=None))
        for column in hidden[:, :, 0].unbind(1):
            self.num_computed += 1
            active = torch.tensor([count > 0 for count in row_tokens])
            self.state = torch.where(active, self.state[:, 0] * 0.9 + column, self.state[:, 0])[:, None]

    def step(self, hidden: torch.Tensor, row_tokens: tuple[int, ...]) -> None:
        num_columns = len(self.columns)
        if self.past.wants_copy(num_columns, hidden.shape[1]):
            self.past.keep_copy(num_columns, [self.state.clone(), None])
        self.compute(num_columns, hidden, row_tokens)
        for column in hidden[:, :, 0].unbind(1):
            self.columns.append(torch.where(torch.tensor(row_tokens) > 0, column, torch.nan))

    def go_back(self, num_columns: int, order: tuple[int, ...] | None, max_tokens: int) -> None:
        start, states = self.past.go_back(num_columns)
        assert start <= num_columns
        self.state = torch.zeros_like(self.state) if not states else states[0].clone()  # type: ignore[union-attr]
        del self.columns[num_columns:]
        if order is not None:
            self.reorder(order)
        for entry in self.past.take_inputs(start, max_tokens):
            self.compute(entry.start, entry.hidden_RNH, entry.row_tokens)

    def reorder(self, order: tuple[int, ...]) -> None:
        rows = list(order)
        self.past.reorder(order)
        self.state = self.state[rows]
        self.columns = [column[rows] for column in self.columns]


@pytest.mark.parametrize("seed", range(30))
def test_any_mixture_of_steps_orders_and_returns_ends_in_the_same_states(seed: int) -> None:
    rng = random.Random(seed)
    num_rows = rng.randint(1, 3)
    sums = Sums(num_rows)
    for _ in range(40):
        order = tuple(rng.randrange(num_rows) for _ in range(num_rows)) if rng.random() < 0.3 else None
        if sums.columns and rng.random() < 0.35:
            most = min(len(sums.columns), rng.choice((3, 100)))
            sums.go_back(len(sums.columns) - rng.randint(1, most), order, rng.choice((4, 1000)))
        elif order is not None:
            sums.reorder(order)
        width = rng.choice((1, 1, 1, 2, 5, 20))
        active = [rng.random() < 0.8 for _ in range(num_rows)]
        active[rng.randrange(num_rows)] = True
        hidden = torch.tensor([[[rng.random()] for _ in range(width)] for _ in range(num_rows)])
        sums.step(hidden, tuple(width * is_active for is_active in active))
        torch.testing.assert_close(sums.state, sums.expected())


def test_taking_back_drafts_computes_few_columns() -> None:
    sums = Sums(1)
    sums.step(torch.ones(1, 500, 1), (500,))
    for _ in range(100):
        before = sums.num_computed
        sums.step(torch.ones(1, 5, 1), (5,))
        sums.go_back(len(sums.columns) - 3, None, 1000)
        assert sums.num_computed - before <= 5 + COPY_INTERVAL_COLUMNS


def test_single_tokens_are_computed_again_together() -> None:
    sums = Sums(2)
    for _ in range(12):
        sums.step(torch.ones(2, 1, 1), (1, 1))
    start, _ = sums.past.go_back(10)
    assert start == 0
    assert [entry.row_tokens for entry in sums.past.take_inputs(0, 8)] == [(4, 4), (4, 4), (2, 2)]
