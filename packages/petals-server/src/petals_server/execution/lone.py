"""Sessions that keep their caches for themselves and go through the span alone.

Those of blocks with recurrent states, and of blocks that count positions by the columns of a cache.

Letters: R rows, T tokens of all rows together, N columns of a chunk, H hidden size.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, final

import torch

from petals_core.identity import PeerId
from petals_core.models.low_rank import Adapter
from petals_core.models.span import Span
from petals_server.adapters import adapted
from petals_server.cache.pages import CachePages
from petals_server.columns import Chunk, split_columns
from petals_server.deep_prompts import SessionPrompts
from petals_server.execution.forward import StatesWork
from petals_server.execution.session import SessionState
from petals_server.execution.states import InputStates, as_mask, default_positions
from petals_server.recurrence import Input, RecurrentPast, States
from petals_server.scheduling.plan import Take
from petals_server.scheduling.request import MAX_DECODE_COLUMNS, Urgency
from petals_server.threads import ThreadPlan


@final
class LoneSession(SessionState):
    """A session that keeps its caches for itself. Its page tables only count, so that all sessions share one budget."""

    def __init__(
        self,
        span: Span,
        pages: CachePages,
        *,
        num_rows: int,
        max_length: int,
        prompts: SessionPrompts | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        super().__init__(span, pages, num_rows=num_rows, max_length=max_length, prompts=prompts, adapters=adapters)
        self.cache: Any = span.new_cache()
        self.past = RecurrentPast() if span.is_recurrent else None
        """What it takes to go back where a block's state can't be cut; None where all can."""

    def reserve(self, keep: int, order: Sequence[int] | None, row_tokens: Sequence[int]) -> bool:
        """Take pages for a step; False if there are none now. With the engine's lock held."""
        lengths = self.ledger.count_within(keep)
        counts = list(row_tokens)
        if order is not None:
            lengths = [lengths[row] for row in order]
        totals = [length + count for length, count in zip(lengths, counts, strict=True)]
        empty = [0] * len(totals)
        if not self.pages.has_room(empty, totals, None):
            return False
        self.pages.truncate(empty)
        self.pages.grow(empty, totals)
        return True

    def crop(self, num_columns: int) -> bool:
        """Forget all columns but the first ``num_columns``, or even more: then what is missing has to be recomputed.

        Returns:
            Whether that is so; :meth:`missing` says what.
        """
        if num_columns >= self.ledger.num_columns:
            return False
        states: States = []
        kept = num_columns
        if self.past is not None:
            kept, states = self.past.go_back(num_columns)
        self.ledger.crop(kept)
        self.span.crop(self.cache, kept)
        if self.past is not None:
            self.span.put_states(self.cache, states)
        return kept < num_columns

    def missing(self, max_tokens: int) -> list[Input]:
        """What has to be computed again behind :meth:`crop`, in pieces of ``max_tokens`` tokens."""
        assert self.past is not None
        return self.past.take_inputs(self.ledger.num_columns, max_tokens)

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i be what row ``order[i]`` was."""
        if list(order) == list(range(len(order))):
            return
        self.ledger.reorder(order)
        if self.past is not None:
            self.past.reorder(order)
        if self.ledger.num_columns:
            self.cache.reorder_cache(torch.tensor(order))

    def prepare_step(self, num_new: int) -> None:
        """Get ready to take back the next ``num_new`` columns."""
        num_columns = self.ledger.num_columns
        if self.past is not None and self.past.wants_copy(num_columns, num_new):
            self.past.keep_copy(num_columns, self.span.copy_states(self.cache))

    def compute(
        self, hidden_RNH: torch.Tensor, row_tokens: tuple[int, ...], positions_RN: torch.Tensor | None
    ) -> torch.Tensor:
        """Append columns and return what comes out of the span; ``positions_RN`` None: rows go on from their length."""
        ledger = self.ledger
        if self.past is not None:
            self.past.append(
                Input(start=ledger.num_columns, hidden_RNH=hidden_RNH, row_tokens=row_tokens, positions_RN=positions_RN)
            )
        idle = [row for row, count in enumerate(row_tokens) if count == 0]
        rows_of_pads = torch.tensor(idle, device=hidden_RNH.device) if idle and self.past is not None else None
        states = None if rows_of_pads is None else self.span.copy_states(self.cache, rows_of_pads)
        row_lengths = ledger.row_lengths
        ledger.append(row_tokens)
        has_mask = ledger.has_pads or positions_RN is not None
        if has_mask and positions_RN is None:
            positions_RN = default_positions(row_tokens, row_lengths).to(hidden_RNH.device)
        with (
            nullcontext() if self.prompts is None else self.prompts.added(row_tokens, row_lengths),
            adapted(self.span, [(adapter, None) for adapter in self.adapters]),
        ):
            output_RNH = self.span(
                hidden_RNH,
                attention_mask=as_mask(ledger.valid(), hidden_RNH.device) if has_mask else None,
                position_ids=positions_RN,
                cache=self.cache,
            )
        if states is not None:  # A pad is no token: it leaves a recurrent state as it was.
            self.span.put_states(self.cache, states, rows_of_pads)
        return output_RNH


@final
class LoneStepWork(StatesWork):
    """A session's next step, or several that amount to one, alone on the device."""

    def __init__(
        self,
        session: LoneSession,
        threads: ThreadPlan,
        states: InputStates,
        *,
        keep: int,
        row_order: tuple[int, ...] | None,
        deadline_s: float,
        max_turn_tokens: int,
        peer_id: PeerId | None = None,
    ) -> None:
        urgency = Urgency.DECODE if max(states.row_tokens) <= MAX_DECODE_COLUMNS else Urgency.BULK
        super().__init__(
            session.span,
            threads,
            states,
            urgency=urgency,
            deadline_s=deadline_s,
            max_turn_tokens=max_turn_tokens,
            peer_id=peer_id,
            session=session,
        )
        self.session: LoneSession = session
        self._keep = keep
        self._row_order = row_order
        self._todo: deque[Chunk | Input] = deque(
            split_columns(states.row_tokens, max_turn_tokens, is_whole=session.past is not None)
        )
        self._is_loaded = False
        self._is_prepared = False

    def take(self, count: int) -> Take | None:
        if not self.is_begun:
            if not self.session.reserve(self._keep, self._row_order, self.states.row_tokens):
                return None
            self.session.is_broken = True  # until the step is complete
        return Take(rows=(), copies=())

    @torch.inference_mode()
    def advance(self, num_tokens: int) -> bool:
        self.threads.apply(self.urgency)
        session = self.session
        if not self._is_loaded:
            self._is_loaded = True
            self.load_input()
            has_gap = session.crop(self._keep)
            if self._row_order is not None:
                session.reorder(self._row_order)
            if has_gap:
                self._todo.extendleft(reversed(session.missing(self.max_turn_tokens)))
        if self._todo:
            self._compute(self._todo.popleft())
        if self._todo:
            return False
        session.is_broken = False
        self.store_output()
        return True

    def _is_consecutive(self) -> bool:
        """Whether the client's positions are what they would be without being given."""
        runs = self.states.position_runs
        return runs is not None and all(
            row == ((length, count),) or (not row and count == 0)
            for row, length, count in zip(runs, self.session.ledger.row_lengths, self.states.row_tokens, strict=True)
        )

    def _compute(self, todo: Chunk | Input) -> None:
        session = self.session
        if isinstance(todo, Input):
            session.compute(todo.hidden_RNH, todo.row_tokens, todo.positions_RN)
            return
        if not self._is_prepared:
            self._is_prepared = True
            session.prepare_step(max(self.states.row_tokens))
            if self._is_consecutive():
                self.positions_T = None
        self.put(todo, session.compute(self.padded(todo), todo.row_tokens, self.chunk_positions(todo)))
