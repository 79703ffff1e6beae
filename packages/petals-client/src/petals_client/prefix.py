"""Virtual tokens before the tokens of every row, which nobody but the servers sees.

Tuned prompts are states that stand before a row's first token. They are put in on the way to the servers and taken out
on the way back, so that masks, positions and lengths are those of the tokens alone everywhere else.

Letters: R rows, N tokens of all rows, P virtual tokens of a row, B blocks, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from petals_client.chain import ChainSession, StepRequest
from petals_client.packing import PositionRuns
from petals_client.trace import StepTrace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefix:
    """Virtual tokens, the same before every row."""

    states: Tensor
    """What goes into the first block [P, H]."""
    prompts: Tensor | None
    """Deep prompts [B, 1, P, H]."""

    @property
    def num_tokens(self) -> int:
        return self.states.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefixed:
    """Packed rows that begin with virtual tokens."""

    packed: Tensor
    """[N + R P, H]"""
    row_tokens: tuple[int, ...]
    position_runs: PositionRuns | None
    places: Tensor
    """Where the tokens stand: int64 [N]."""


def prepend(states: Tensor, packed: Tensor, row_tokens: tuple[int, ...], runs: PositionRuns | None) -> Prefixed:
    """Put ``states`` [P, H] before each row of ``packed`` [N, H]; differentiable."""
    num_states = states.shape[0]
    order: list[Tensor] = []
    places: list[Tensor] = []
    first = 0
    for row, count in enumerate(row_tokens):
        start = first + (row + 1) * num_states
        order += [torch.arange(num_states), torch.arange(num_states + first, num_states + first + count)]
        places.append(torch.arange(start, start + count))
        first += count
    return Prefixed(
        packed=torch.cat([states.to(packed), packed]).index_select(0, torch.cat(order)),
        row_tokens=tuple(count + num_states for count in row_tokens),
        position_runs=None if runs is None else tuple(((0, num_states), *row) for row in _shift(runs, num_states)),
        places=torch.cat(places),
    )


def _shift(runs: PositionRuns, offset: int) -> PositionRuns:
    return tuple(tuple((first + offset, count) for first, count in row) for row in runs)


class PrefixedSession:
    """A ``ChainSession`` whose rows begin with virtual tokens, in columns that its user does not count."""

    def __init__(self, session: ChainSession, prefix: Prefix) -> None:
        self._session = session
        self._states = prefix.states.detach().cpu()
        self._is_sent = False

    def step(self, hidden: Tensor, request: StepRequest, *, num_wanted: int | None = None) -> Tensor:
        """See ``ChainSession.step``."""
        num_states = self._states.shape[0]
        num_rows = len(request.row_tokens)
        if not self._is_sent:
            self._is_sent = True
            if min(request.row_tokens) == max(request.row_tokens):
                whole = prepend(self._states, hidden, request.row_tokens, request.position_runs)
                request = replace(request, row_tokens=whole.row_tokens, position_runs=whole.position_runs)
                return self._session.step(whole.packed, request, num_wanted=num_wanted).index_select(0, whole.places)
            # The servers' rows end at the same column. Sent alone, the virtual tokens begin at the same one too.
            states = self._states.to(hidden).repeat(num_rows, 1)
            self._session.step(states, StepRequest(keep=0, row_tokens=(num_states,) * num_rows))
        runs = request.position_runs
        return self._session.step(
            hidden,
            replace(
                request,
                keep=request.keep + num_states,
                position_runs=None if runs is None else _shift(runs, num_states),
            ),
            num_wanted=num_wanted,
        )

    def trace(self) -> tuple[StepTrace, ...]:
        """See ``ChainSession.trace``."""
        return self._session.trace()

    def close(self) -> None:
        """See ``ChainSession.close``."""
        self._session.close()
