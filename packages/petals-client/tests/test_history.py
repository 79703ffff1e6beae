"""A history, replayed, gives the rows that the steps themselves gave."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_client.chain import StepRequest
from petals_client.history import StepHistory, merge_steps

R = 2
State = tuple[tuple[int, ...], ...]
"""The names of each row's tokens."""


class Rows:
    """What a server holds: names in right-aligned columns."""

    def __init__(self) -> None:
        self.rows: list[list[int | None]] = [[] for _ in range(R)]

    def step(self, request: StepRequest, states: State) -> None:
        assert tuple(map(len, states)) == request.row_tokens
        assert request.keep <= len(self.rows[0])
        self.rows = [row[: request.keep] for row in self.rows]
        if request.row_order is not None:
            self.rows = [list(self.rows[row]) for row in request.row_order]
        most = max(request.row_tokens)
        for row, new in zip(self.rows, states, strict=True):
            row += [None] * (most - len(new)) + list(new)


def join(parts: list[tuple[tuple[int, ...], State]]) -> State:
    return tuple(tuple(name for _, states in parts for name in states[row]) for row in range(R))


steps = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
        st.one_of(st.none(), st.tuples(st.integers(0, R - 1), st.integers(0, R - 1))),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(2, 12))
def test_replaying(drawn: list[tuple[float, tuple[int, ...], tuple[int, ...] | None]], max_tokens: int) -> None:
    rows, history = Rows(), StepHistory[State](10**6)
    name = 0
    for keep, counts, order in drawn:
        # Mostly everything is kept, as in decoding.
        kept = len(rows.rows[0]) if keep > 0.3 else round(keep * len(rows.rows[0]))
        names = iter(range(name, name + sum(counts)))
        states = tuple(tuple(next(names) for _ in range(count)) for count in counts)
        name += sum(counts)
        request = StepRequest(keep=kept, row_tokens=counts, row_order=order)
        rows.step(request, states)
        history.append(request, states, 1)
        again, merged = Rows(), Rows()
        for sent in history.steps:
            again.step(sent.request, sent.states)
        assert again.rows == rows.rows
        for request, states in merge_steps(history.steps, join, max_tokens):
            merged.step(request, states)
        assert merged.rows == rows.rows
        assert history.num_bytes == len(history.steps)


def test_many_tokens_are_replayed_in_few_steps() -> None:
    history = StepHistory[State](10**6)
    for position in range(100):
        history.append(StepRequest(keep=position, row_tokens=(1, 1)), ((position,), (position,)), 1)
    merged = merge_steps(history.steps, join, 60)
    assert [request.row_tokens for request, _ in merged] == [(30, 30), (30, 30), (30, 30), (10, 10)]
    assert [request.keep for request, _ in merged] == [0, 30, 60, 90]


def test_positions_of_the_caller_are_not_merged() -> None:
    history = StepHistory[State](10**6)
    history.append(StepRequest(keep=0, row_tokens=(1, 1), position_runs=(((5, 1),), ((5, 1),))), ((0,), (0,)), 1)
    history.append(StepRequest(keep=1, row_tokens=(1, 1)), ((1,), (1,)), 1)
    assert len(merge_steps(history.steps, join, 60)) == 2


def test_what_was_taken_back_takes_no_memory() -> None:
    history = StepHistory[State](10**6)
    for _ in range(50):
        history.append(StepRequest(keep=0, row_tokens=(1, 0)), ((0,), ()), 8)
    assert history.num_bytes == 8


def test_over_budget_it_says_so_until_the_session_begins_anew() -> None:
    history = StepHistory[State](10)
    for position in range(11):
        history.append(StepRequest(keep=position, row_tokens=(1, 1)), ((0,), (0,)), 1)
    assert not history.is_complete
    assert history.num_bytes == 0
    history.append(StepRequest(keep=0, row_tokens=(1, 1)), ((0,), (0,)), 1)
    assert history.is_complete
    assert history.num_bytes == 1


@pytest.mark.parametrize("budget", [0])
def test_no_budget(budget: int) -> None:
    history = StepHistory[State](budget)
    history.append(StepRequest(keep=0, row_tokens=(1, 1)), ((0,), (0,)), 1)
    assert not history.is_complete
