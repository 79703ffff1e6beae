"""What a server was sent in a session, so that another server can be brought to the same state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from petals_client.chain import StepRequest

S = TypeVar("S")
"""Hidden states in any form."""


@dataclass(frozen=True, slots=True)
class Sent(Generic[S]):
    """One step."""

    request: StepRequest
    states: S
    num_bytes: int

    @property
    def end(self) -> int:
        """Columns behind it."""
        return self.request.keep + max(self.request.row_tokens)


class StepHistory(Generic[S]):
    """The steps that still matter, up to a budget of memory. What was taken back is forgotten."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._steps: list[Sent[S]] = []
        self.num_bytes = 0
        self.is_complete = True
        """Whether nothing that matters was dropped for want of memory."""

    @property
    def steps(self) -> tuple[Sent[S], ...]:
        """Sent one after another to an empty session they rebuild it."""
        return tuple(self._steps)

    def append(self, request: StepRequest, states: S, num_bytes: int) -> None:
        """Note a step that was done."""
        order = request.row_order
        while self._steps and self._steps[-1].request.keep >= request.keep:
            taken_back = self._steps.pop()
            self.num_bytes -= taken_back.num_bytes
            before = taken_back.request.row_order
            if before is not None:
                # Its tokens are gone, its change of rows is not.
                order = before if order is None else tuple(before[row] for row in order)
        if request.keep == 0:
            self.is_complete = True
            order = None  # no row has anything yet that it could take along
        if not self.is_complete:
            return
        if self.num_bytes + num_bytes > self._budget_bytes:
            self._steps.clear()
            self.num_bytes = 0
            self.is_complete = False
            return
        if order is not request.row_order:
            request = replace(request, row_order=order)
        self._steps.append(Sent(request, states, num_bytes))
        self.num_bytes += num_bytes


def merge_steps(
    steps: Iterable[Sent[S]], join: Callable[[list[tuple[tuple[int, ...], S]]], S], max_tokens: int
) -> list[tuple[StepRequest, S]]:
    """Put steps together that amount to one, so that a session of many single tokens is rebuilt in a few steps.

    A step continues the one before it where it keeps all of it, in the same order of rows, has a token in each of its
    columns, and positions that go on; then each row's tokens stand beside each other, as those of one step do. ``join``
    makes one packed batch of several, given as (row_tokens, states).
    """
    merged: list[tuple[StepRequest, S]] = []
    group: list[Sent[S]] = []

    def finish() -> None:
        if not group:
            return
        counts = tuple(map(sum, zip(*(sent.request.row_tokens for sent in group), strict=True)))
        states = group[0].states
        if len(group) > 1:
            states = join([(sent.request.row_tokens, sent.states) for sent in group])
        merged.append((replace(group[0].request, row_tokens=counts), states))
        group.clear()

    for sent in steps:
        request = sent.request
        fits = (
            bool(group)
            and request.keep == group[-1].end
            and request.row_order is None
            and request.position_runs is None
            and group[0].request.position_runs is None
            and min(request.row_tokens) == max(request.row_tokens)
            and sum(sum(each.request.row_tokens) for each in group) + sum(request.row_tokens) <= max_tokens
        )
        if not fits:
            finish()
        group.append(sent)
    finish()
    return merged
