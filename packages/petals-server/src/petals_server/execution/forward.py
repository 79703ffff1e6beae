"""Whole rows through a span without a session.

Letters: R rows, T tokens of all rows together, N columns of a chunk, H hidden size.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from petals_core.identity import PeerId
from petals_core.models.span import Span
from petals_server.columns import Chunk, spread, take_rows
from petals_server.execution.states import EncodedStates, InputStates, PackedStates, as_mask, default_positions
from petals_server.scheduling.request import Urgency
from petals_server.threads import ThreadPlan
from petals_server.work import Work


class StatesWork(Work[tuple[EncodedStates, ...]]):
    """Packed states in, chunks through the span as padded batches, packed states out; one request at a time."""

    def __init__(
        self,
        span: Span,
        threads: ThreadPlan,
        states: InputStates,
        *,
        urgency: Urgency,
        deadline_s: float,
        max_turn_tokens: int,
        peer_id: PeerId | None,
        session: object | None = None,
    ) -> None:
        super().__init__(
            urgency=urgency,
            num_tokens=sum(states.row_tokens),
            deadline_s=deadline_s,
            peer_id=peer_id,
            session=session,
            max_turn_tokens=max_turn_tokens,
        )
        self.span = span
        self.threads = threads
        self.states = states
        self.input_TH: torch.Tensor
        self._received_TH: torch.Tensor
        self.output_TH: torch.Tensor | None = None
        self.positions_T: NDArray[np.int64] | None = None

    @property
    def is_heavy(self) -> bool:
        return self.states.is_heavy

    def prepare(self) -> None:
        self._received_TH = self.states.decode()
        self.positions_T = self.states.positions()

    def load_input(self) -> None:
        """Bring what came to the device; to be called there, once."""
        self.input_TH = self._received_TH.to(device=self.span.device, dtype=self.span.dtype)
        del self._received_TH

    def padded(self, chunk: Chunk) -> torch.Tensor:
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

    def store_output(self) -> None:
        """Bring what is complete back from the device."""
        self.output_TH = (self.input_TH if self.output_TH is None else self.output_TH).cpu()

    def result(self) -> tuple[EncodedStates, ...]:
        assert self.output_TH is not None
        return self.states.encode(self.output_TH)


@final
class ForwardWork(StatesWork):
    """Whole rows through the span, without a cache."""

    def __init__(
        self,
        span: Span,
        threads: ThreadPlan,
        states: PackedStates,
        *,
        deadline_s: float,
        max_turn_tokens: int,
        peer_id: PeerId | None = None,
    ) -> None:
        super().__init__(
            span,
            threads,
            states,
            urgency=Urgency.BULK,
            deadline_s=deadline_s,
            max_turn_tokens=max_turn_tokens,
            peer_id=peer_id,
        )
        self._next_row = 0
        self._row_done = 0
        """Tokens of the row that is computed in pieces."""
        self._cache: Any = None
        """Of that row."""

    @torch.inference_mode()
    def advance(self, num_tokens: int) -> bool:
        self.threads.apply(self.urgency)
        if self.num_done == 0:
            self.load_input()
        row_tokens = self.states.row_tokens
        most = 1 if self._row_done else num_tokens  # a row that is begun is finished before others are
        taken = take_rows(row_tokens, self._next_row, most, is_whole=self.span.is_recurrent)
        if taken is not None:
            chunk, behind = taken
            is_piece = sum(chunk.row_tokens) > most and not self.span.is_recurrent
            if is_piece:
                chunk = self._piece(chunk, num_tokens)
            self._compute(chunk)
            self.num_done += sum(chunk.row_tokens)
            if not is_piece or self._row_done == row_tokens[behind - 1]:
                self._next_row, self._row_done, self._cache = behind, 0, None
        if self.num_done < self.num_tokens:
            return False
        self.store_output()
        return True

    def _piece(self, row: Chunk, num_tokens: int) -> Chunk:
        """The next tokens of a row that is too long for one turn."""
        if self._cache is None:
            self._cache = self.span.new_cache()
        count = min(num_tokens, row.row_tokens[0] - self._row_done)
        piece = Chunk(row_tokens=(count,), row_starts=(row.row_starts[0] + self._row_done,))
        self._row_done += count
        return piece

    def _compute(self, chunk: Chunk) -> None:
        # A mask is given with positions even where it masks nothing: without one, Transformers reads positions
        # that start anew as several sequences packed into a row.
        has_mask = self.positions_T is not None or not chunk.is_rectangular
        positions_RN = self.chunk_positions(chunk)
        if has_mask and positions_RN is None:
            positions_RN = default_positions(chunk.row_tokens, [0] * len(chunk.row_tokens)).to(self.span.device)
        valid_RC = spread(chunk.row_tokens if self._cache is None else (self._row_done,))
        hidden_RNH = self.span(
            self.padded(chunk),
            attention_mask=as_mask(valid_RC, self.span.device) if has_mask else None,
            position_ids=positions_RN,
            cache=self._cache,
        )
        self.put(chunk, hidden_RNH)
