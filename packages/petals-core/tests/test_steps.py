"""A history, replayed, gives the rows that the steps themselves gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.steps import StepHistory, StepRequest, continues, merge, straighten

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


def select(row_tokens: Sequence[int], states: State, rows: Sequence[int]) -> State:
    assert tuple(map(len, states)) == tuple(row_tokens)
    return tuple(states[row] for row in rows)


def rebuild(history: StepHistory[State], number: int, max_tokens: int) -> Rows | None:
    """What an empty server holds after the steps before ``number``; None: they can't be rewritten."""
    straight = straighten(history.before(number), select)
    if straight is None:
        return None
    rows = Rows()
    for _, request, states in merge(straight, join, max_tokens):
        assert request.row_order is None
        rows.step(request, states)
    return rows


steps = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
        st.one_of(st.none(), st.tuples(st.integers(0, R - 1), st.integers(0, R - 1))),
        st.booleans(),
    ),
    max_size=12,
)


@settings(max_examples=100)
@given(steps, st.integers(2, 12))
def test_rebuilding(drawn: list[tuple[float, tuple[int, ...], tuple[int, ...] | None, bool]], max_tokens: int) -> None:
    """Before a step and behind it, also when it was done twice, the rows are those of who did the steps themselves."""
    rows, history = Rows(), StepHistory[State](10**6)
    name = 0
    for number, (keep, counts, order, is_repeated) in enumerate(drawn):
        # Mostly everything is kept, as in decoding.
        kept = len(rows.rows[0]) if keep > 0.3 else round(keep * len(rows.rows[0]))
        names = iter(range(name, name + sum(counts)))
        states = tuple(tuple(next(names) for _ in range(count)) for count in counts)
        name += sum(counts)
        request = StepRequest(keep=kept, row_tokens=counts, row_order=order)
        before = [row[:kept] for row in rows.rows]
        rows.step(request, states)
        for _ in range(1 + is_repeated):
            history.append(number, request, states, 1)
        assert history.num_bytes == len(history.steps)
        begun = rebuild(history, number, max_tokens)
        assert begun is None or [row[:kept] for row in begun.rows] == before
        done = rebuild(history, number + 1, max_tokens)
        assert done is None or done.rows == rows.rows


def test_rows_that_change_places_are_merged_all_the_same() -> None:
    """Beam search: what is left of the beams takes as few steps as greedy decoding."""
    history = StepHistory[State](10**6)
    history.append(0, StepRequest(keep=0, row_tokens=(2, 2)), ((0, 1), (10, 11)), 1)
    for position in range(2, 40):
        order = (position % 2, 0)
        history.append(
            position, StepRequest(keep=position, row_tokens=(1, 1), row_order=order), ((position,), (position,)), 1
        )
    straight = straighten(history.steps, select)
    assert straight is not None
    assert len(merge(straight, join, 100)) == 1


def test_many_tokens_are_replayed_in_few_steps() -> None:
    history = StepHistory[State](10**6)
    for position in range(100):
        history.append(position, StepRequest(keep=position, row_tokens=(1, 1)), ((position,), (position,)), 1)
    straight = straighten(history.before(100), select)
    assert straight is not None
    merged = merge(straight, join, 60)
    assert [request.row_tokens for _, request, _ in merged] == [(30, 30), (30, 30), (30, 30), (10, 10)]
    assert [request.keep for _, request, _ in merged] == [0, 30, 60, 90]
    assert [number for number, _, _ in merged] == [29, 59, 89, 99]


def test_positions_of_the_caller_are_not_merged() -> None:
    history = StepHistory[State](10**6)
    history.append(0, StepRequest(keep=0, row_tokens=(1, 1), position_runs=(((5, 1),), ((5, 1),))), ((0,), (0,)), 1)
    history.append(1, StepRequest(keep=1, row_tokens=(1, 1)), ((1,), (1,)), 1)
    assert len(merge([(sent.number, sent.request, sent.states) for sent in history.steps], join, 60)) == 2


def test_what_was_taken_back_takes_no_memory() -> None:
    history = StepHistory[State](10**6)
    for number in range(50):
        history.append(number, StepRequest(keep=0, row_tokens=(1, 0)), ((0,), ()), 8)
    assert history.num_bytes == 8


def test_over_budget_it_says_so_until_the_session_begins_anew() -> None:
    history = StepHistory[State](10)
    for position in range(11):
        history.append(position, StepRequest(keep=position, row_tokens=(1, 1)), ((0,), (0,)), 1)
    assert not history.is_complete
    assert history.num_bytes == 0
    history.append(11, StepRequest(keep=0, row_tokens=(1, 1)), ((0,), (0,)), 1)
    assert history.is_complete
    assert history.num_bytes == 1


def test_no_budget() -> None:
    history = StepHistory[State](0)
    history.append(0, StepRequest(keep=0, row_tokens=(1, 1)), ((0,), (0,)), 1)
    assert not history.is_complete


@pytest.mark.parametrize(
    ("step", "does"),
    [
        ({}, True),
        ({"row_tokens": (1, 1)}, True),
        ({"row_tokens": (2, 1)}, False),
        ({"row_tokens": (2, 2, 2)}, False),
        ({"keep": 4}, False),
        ({"keep": 6}, False),
        ({"row_order": (0, 1)}, False),
        ({"position_runs": (((5, 2),), ((5, 2),))}, False),
    ],
)
def test_what_amounts_to_one_step(step: dict[str, Any], does: bool) -> None:
    before = StepRequest(keep=2, row_tokens=(3, 1))
    after = StepRequest(**{"keep": 5, "row_tokens": (2, 2), **step})
    assert continues(after, before) is does
    assert not continues(after, replace(before, position_runs=(((2, 3),), ((2, 1),))))
