"""The computations that clients ask for: a session's step, and a forward pass without a session.

Letters: R rows, T tokens of all rows together, N columns of a chunk, C columns of a session's cache, H hidden size.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from petals_core.models.low_rank import Adapter
from petals_core.models.split import Span
from petals_core.tensors.codec import Compression, Encoding, TensorSpec, decode, encode
from petals_server.adapters import adapted
from petals_server.columns import (
    Chunk,
    ColumnLedger,
    PositionRuns,
    expand_positions,
    split_columns,
    split_rows,
    spread,
)
from petals_server.deep_prompts import SessionPrompts
from petals_server.engine import Work
from petals_server.recurrence import Input, RecurrentPast, States
from petals_server.scheduling import MAX_DECODE_COLUMNS, Urgency
from petals_server.threads import ThreadPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStates:
    """Hidden states [T, H] as they came from a client, checked but not yet decoded."""

    spec: TensorSpec
    payload: memoryview
    row_tokens: tuple[int, ...]
    position_runs: PositionRuns | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedStates:
    """Hidden states [T, H] as they go back: logical dtype, encoding and compression are those of the request."""

    spec: TensorSpec
    buffers: Sequence[memoryview]


class SessionState:
    """A session's cache and its ledger. Only the device's thread touches them while a step is under way."""

    def __init__(
        self,
        span: Span,
        *,
        num_rows: int,
        max_length: int,
        prompts: SessionPrompts | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        self.span = span
        self.adapters = adapters
        """What changes the span's layers for this session."""
        self.max_length = max_length
        self.prompts = prompts
        self.ledger = ColumnLedger(num_rows)
        self.cache: Any = span.new_cache()
        self.past = RecurrentPast() if span.is_recurrent else None
        """What it takes to go back where a block's state can't be cut; None where all can."""
        self.is_broken = False
        """A step failed half-way: what the cache holds is unknown, and the session has to end."""

    def free(self) -> None:
        """Give the cache up; no step may be under way, and none can follow."""
        self.is_broken = True
        self.cache = self.past = None

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


def default_positions(row_tokens: Sequence[int], row_lengths: Sequence[int]) -> torch.Tensor:
    """Position ids [R, N] of tokens behind ``row_lengths`` cached ones; those of pads are 0."""
    num_columns = max(row_tokens)
    positions_RN = np.zeros((len(row_tokens), num_columns), dtype=np.int64)
    for row, (length, count) in enumerate(zip(row_lengths, row_tokens, strict=True)):
        positions_RN[row, num_columns - count :] = np.arange(length, length + count)
    return torch.from_numpy(positions_RN)


def as_mask(valid_RC: NDArray[np.bool_], device: torch.device) -> torch.Tensor:
    """A 2D attention mask as a span takes it, int64 [R, C]."""
    return torch.from_numpy(valid_RC).to(device=device, dtype=torch.int64)


class _StatesWork(Work[EncodedStates]):
    """What step and forward share: packed states in, chunks through the span, packed states out."""

    def __init__(
        self, span: Span, threads: ThreadPlan, states: PackedStates, *, urgency: Urgency, deadline_s: float
    ) -> None:
        super().__init__(urgency=urgency, num_tokens=sum(states.row_tokens), deadline_s=deadline_s)
        self.span = span
        self.threads = threads
        self.states = states
        self.input_TH: torch.Tensor
        self.output_TH: torch.Tensor | None = None
        self.positions_T: NDArray[np.int64] | None = None

    def decode_input(self) -> None:
        """Decode the payload; raises ``ProtocolError``."""
        states = self.states
        self.input_TH = decode(states.spec, states.payload).to(device=self.span.device, dtype=self.span.dtype)
        if states.position_runs is not None:
            self.positions_T = np.concatenate([expand_positions(runs) for runs in states.position_runs])

    def take(self, chunk: Chunk) -> torch.Tensor:
        """The chunk's states as a left-padded batch [R, N, H]; pads are zeros."""
        if chunk.is_rectangular and (len(chunk.row_tokens) == 1 or chunk.num_columns == self.input_TH.shape[0]):
            start = chunk.row_starts[0]
            return self.input_TH[start : start + chunk.num_columns].unsqueeze(0)
        padded_RNH = self.input_TH.new_zeros(len(chunk.row_tokens), chunk.num_columns, self.input_TH.shape[1])
        for row, (start, count) in enumerate(zip(chunk.row_starts, chunk.row_tokens, strict=True)):
            padded_RNH[row, chunk.num_columns - count :] = self.input_TH[start : start + count]
        return padded_RNH

    def put(self, chunk: Chunk, hidden_RNH: torch.Tensor) -> None:
        """Keep the span's output for the chunk."""
        num_tokens = self.num_tokens
        if sum(chunk.row_tokens) == num_tokens and chunk.is_rectangular:
            self.output_TH = hidden_RNH.reshape(num_tokens, hidden_RNH.shape[2])
            return
        if self.output_TH is None:
            self.output_TH = hidden_RNH.new_empty(num_tokens, hidden_RNH.shape[2])
        for row, (start, count) in enumerate(zip(chunk.row_starts, chunk.row_tokens, strict=True)):
            self.output_TH[start : start + count] = hidden_RNH[row, chunk.num_columns - count :]

    def chunk_positions(self, chunk: Chunk) -> torch.Tensor | None:
        """The client's position ids [R, N] of the chunk's tokens, 0 at pads; None if it gave none."""
        if self.positions_T is None:
            return None
        positions_RN = np.zeros((len(chunk.row_tokens), chunk.num_columns), dtype=np.int64)
        for row, (start, count) in enumerate(zip(chunk.row_starts, chunk.row_tokens, strict=True)):
            positions_RN[row, chunk.num_columns - count :] = self.positions_T[start : start + count]
        return torch.from_numpy(positions_RN).to(self.span.device)

    def result(self) -> EncodedStates:
        states = self.states
        output_TH = self.input_TH if self.output_TH is None else self.output_TH
        if output_TH.dtype != (dtype := getattr(torch, states.spec.dtype)):
            output_TH = output_TH.to(dtype)
        compression: Compression = "zstd" if states.spec.compression == "zstd" else "none"
        spec, buffers = encode(output_TH, encoding=Encoding(states.spec.encoding), compression=compression)
        return EncodedStates(spec=spec, buffers=buffers)


@final
class StepWork(_StatesWork):
    """A session's next step."""

    def __init__(
        self,
        session: SessionState,
        threads: ThreadPlan,
        states: PackedStates,
        *,
        keep: int,
        row_order: tuple[int, ...] | None,
        deadline_s: float,
        max_turn_tokens: int,
    ) -> None:
        urgency = Urgency.DECODE if max(states.row_tokens) <= MAX_DECODE_COLUMNS else Urgency.BULK
        super().__init__(session.span, threads, states, urgency=urgency, deadline_s=deadline_s)
        self.session = session
        self._keep = keep
        self._row_order = row_order
        self._max_turn_tokens = max_turn_tokens
        self._todo: deque[Chunk | Input] = deque(
            split_columns(states.row_tokens, max_turn_tokens, is_whole=session.past is not None)
        )
        self._is_begun = False
        self._is_prepared = False

    @torch.inference_mode()
    def advance(self) -> bool:
        self.threads.apply(self.urgency)
        session = self.session
        if not self._is_begun:
            self._is_begun = True
            self.decode_input()
            session.is_broken = True  # Until the step is complete.
            has_gap = session.crop(self._keep)
            if self._row_order is not None:
                session.reorder(self._row_order)
            if has_gap:
                self._todo.extendleft(reversed(session.missing(self._max_turn_tokens)))
        if self._todo:
            self._compute(self._todo.popleft())
        if self._todo:
            return False
        session.is_broken = False
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
        self.put(todo, session.compute(self.take(todo), todo.row_tokens, self.chunk_positions(todo)))


@final
class ForwardWork(_StatesWork):
    """Whole rows through the span, without a cache."""

    def __init__(
        self, span: Span, threads: ThreadPlan, states: PackedStates, *, deadline_s: float, max_turn_tokens: int
    ) -> None:
        super().__init__(span, threads, states, urgency=Urgency.BULK, deadline_s=deadline_s)
        self._chunks = split_rows(states.row_tokens, max_turn_tokens, is_whole=span.is_recurrent)
        self._next = 0

    @torch.inference_mode()
    def advance(self) -> bool:
        self.threads.apply(self.urgency)
        if self._next == 0:
            self.decode_input()
        if self._next < len(self._chunks):
            chunk = self._chunks[self._next]
            # A mask is given with positions even where it masks nothing: without one, Transformers reads positions
            # that start anew as several sequences packed into a row.
            has_mask = self.positions_T is not None or not chunk.is_rectangular
            positions_RN = self.chunk_positions(chunk)
            if has_mask and positions_RN is None:
                positions_RN = default_positions(chunk.row_tokens, [0] * len(chunk.row_tokens)).to(self.span.device)
            hidden_RNH = self.span(
                self.take(chunk),
                attention_mask=as_mask(spread(chunk.row_tokens), self.span.device) if has_mask else None,
                position_ids=positions_RN,
                cache=None,
            )
            self.put(chunk, hidden_RNH)
            self._next += 1
        return self._next == len(self._chunks)
