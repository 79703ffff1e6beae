"""The steps of a session that still matter, so that a server can be brought where another one was.

Letters: R rows. Hidden states are a type of the caller's, because nothing here looks into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

PositionRuns = tuple[tuple[tuple[int, int], ...], ...]
RowOrder = tuple[int, ...]
S = TypeVar("S")
"""Hidden states in any form."""


class Appending(Protocol):
    """What a step does, however it is described."""

    @property
    def keep(self) -> int: ...
    @property
    def row_tokens(self) -> tuple[int, ...]: ...
    @property
    def row_order(self) -> RowOrder | None: ...
    @property
    def position_runs(self) -> PositionRuns | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """What a session's step does beside computing its tokens; the words are those of the wire's ``Step``."""

    keep: int
    row_tokens: tuple[int, ...]
    row_order: RowOrder | None = None
    position_runs: PositionRuns | None = None
    wanted: int | None = None
    join_tokens: int | None = None

    @property
    def end(self) -> int:
        """Columns behind it."""
        return self.keep + max(self.row_tokens)

    @property
    def result_tokens(self) -> tuple[int, ...]:
        """Tokens of each row, its last ones, whose states come back."""
        return wanted_tokens(self.row_tokens, self.wanted)


def wanted_tokens(row_tokens: Sequence[int], wanted: int | None) -> tuple[int, ...]:
    """Tokens of each row that stand in the last ``wanted`` columns of a step; None: all."""
    return tuple(row_tokens) if wanted is None else tuple(min(count, wanted) for count in row_tokens)


@dataclass(frozen=True, slots=True)
class Sent(Generic[S]):
    """One step."""

    number: int
    request: StepRequest
    states: S
    num_bytes: int
    order_after: RowOrder | None = None
    """How steps behind it, whose tokens were taken back, have changed the order of rows."""


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
        """Done one after another by an empty session, ``order_after`` included, they rebuild it."""
        return tuple(self._steps)

    def append(self, number: int, request: StepRequest, states: S, num_bytes: int) -> None:
        """Note a step. One of a number that was noted before is done again, and takes the place of what was noted."""
        while self._steps and self._steps[-1].number >= number:
            self._pop()
        if request.keep == 0:
            self.drop()
            self.is_complete = True
        order: RowOrder | None = None
        while self._steps and self._steps[-1].request.keep >= request.keep:
            taken_back = self._pop()
            # Its tokens are gone, its change of rows is not.
            order = compose(compose(taken_back.request.row_order, taken_back.order_after), order)
        if order is not None and self._steps:
            last = self._steps[-1]
            self._steps[-1] = replace(last, order_after=compose(last.order_after, order))
        if not self.is_complete:
            return
        if self.num_bytes + num_bytes > self._budget_bytes:
            self.drop()
            return
        self._steps.append(Sent(number, request, states, num_bytes))
        self.num_bytes += num_bytes

    def drop(self) -> None:
        """Forget everything; until the session begins anew the history is not complete."""
        self._steps.clear()
        self.num_bytes = 0
        self.is_complete = False

    def before(self, number: int) -> list[Sent[S]]:
        """The steps of lower numbers."""
        return [sent for sent in self._steps if sent.number < number]

    def _pop(self) -> Sent[S]:
        sent = self._steps.pop()
        self.num_bytes -= sent.num_bytes
        return sent


def compose(first: RowOrder | None, second: RowOrder | None) -> RowOrder | None:
    """The one order that amounts to two, one after the other; row i continues row ``order[i]``."""
    if first is None or second is None:
        return first or second
    return tuple(first[row] for row in second)


def straighten(
    steps: Sequence[Sent[S]], select: Callable[[Sequence[int], S, Sequence[int]], S]
) -> list[tuple[int, StepRequest, S]] | None:
    """Rewrite steps so that no row changes its place: (number, request, states) that lead to the same rows.

    What became of no row (a beam that was given up) is left out. ``select`` is given a step's row_tokens, its states,
    and the rows to take. None where that can't be: some columns would hold no row's token any more, and a session
    counts columns.
    """
    straight: list[tuple[int, StepRequest, S]] = []
    order: RowOrder | None = None
    """Which row of the step at hand each of the last rows comes from."""
    for sent in reversed(steps):
        order = compose(sent.order_after, order)
        request, states = sent.request, sent.states
        if order is not None and order != tuple(range(len(order))):
            runs = request.position_runs
            if max(request.row_tokens[row] for row in order) < max(request.row_tokens):
                return None
            states = select(request.row_tokens, states, order)
            request = replace(
                request,
                row_tokens=tuple(request.row_tokens[row] for row in order),
                position_runs=None if runs is None else tuple(runs[row] for row in order),
            )
        order = compose(sent.request.row_order, order)
        straight.append((sent.number, replace(request, row_order=None), states))
    straight.reverse()
    return straight


def continues(step: Appending, before: Appending) -> bool:
    """Whether two steps, one after the other, amount to one.

    The second keeps all of the first, in the same order of rows, has a token in each of its columns, and positions go
    on; then each row's tokens stand beside each other, as those of one step do.
    """
    return (
        step.keep == before.keep + max(before.row_tokens)
        and len(step.row_tokens) == len(before.row_tokens)
        and min(step.row_tokens) == max(step.row_tokens)
        and step.row_order is None
        and step.position_runs is None
        and before.position_runs is None
    )


def join_row_tokens(row_tokens: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """New tokens of each row of the step that several amount to."""
    return tuple(map(sum, zip(*row_tokens, strict=True)))


def merge(
    steps: Iterable[tuple[int, StepRequest, S]],
    join: Callable[[list[tuple[tuple[int, ...], S]]], S],
    max_tokens: int,
) -> list[tuple[int, StepRequest, S]]:
    """Put steps together that amount to one, so that a session of many single tokens is rebuilt in a few steps.

    ``join`` makes one packed batch of several, given as (row_tokens, states). The number is that of the last one.
    """
    merged: list[tuple[int, StepRequest, S]] = []
    group: list[tuple[int, StepRequest, S]] = []

    def finish() -> None:
        if not group:
            return
        number, first, states = group[-1][0], group[0][1], group[0][2]
        if len(group) > 1:
            counts = join_row_tokens(request.row_tokens for _, request, _ in group)
            states = join([(request.row_tokens, each) for _, request, each in group])
            first = replace(first, row_tokens=counts)
        merged.append((number, first, states))
        group.clear()

    num_tokens = 0
    for step in steps:
        request = step[1]
        num_new = sum(request.row_tokens)
        if not (group and continues(request, group[-1][1]) and num_tokens + num_new <= max_tokens):
            finish()
            num_tokens = 0
        group.append(step)
        num_tokens += num_new
    finish()
    return merged
