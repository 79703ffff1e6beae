"""Steps of sessions that share turns.

Letters: T tokens of all rows of a step, or of all steps of a turn together; H hidden size.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray

from petals_core.errors import first_line
from petals_core.identity import PeerId
from petals_core.models.span import Span
from petals_server.cache.pages import PageCopy
from petals_server.cache.tensors import CacheTensors
from petals_server.execution import attention, gathered
from petals_server.execution.batch import Batch, active
from petals_server.execution.changes import RowChange, changed
from petals_server.execution.decode_graphs import DecodeGraphs
from petals_server.execution.padded import compute_padded
from petals_server.execution.probe import Form
from petals_server.execution.programs import RecordingError, StepPrograms
from petals_server.execution.session import SessionState
from petals_server.execution.states import EncodedStates, InputStates
from petals_server.execution.traces import LoneTrace
from petals_server.execution.varlen import Kernel, suits
from petals_server.scheduling.plan import Part, RowPart, Take
from petals_server.scheduling.request import MAX_DECODE_COLUMNS, Urgency
from petals_server.threads import ThreadPlan
from petals_server.work import Work

log = logging.getLogger(__name__)

_FEW_TOKENS: Final = 4
"""Turns of no more are computed with the number of threads that is best for one token."""


class StepRunner:
    """Computes turns of steps of one span. Used by one thread at a time."""

    def __init__(
        self,
        span: Span,
        cache: CacheTensors,
        *,
        first_layer: int,
        form: Form,
        threads: ThreadPlan,
        kernel: Kernel | None = None,
        with_replay: bool = False,
    ) -> None:
        """
        Args:
            first_layer: where in the cache the span's blocks begin.
            kernel: attends for all rows at once where it can.
            with_replay: whether turns of few tokens are replayed: on CUDA from recorded graphs, where it can, elsewhere
                by recorded programs.
        """
        self.span = span
        self.cache = cache
        self.first_layer = first_layer
        self.form = form
        self.threads = threads
        self._kernel = kernel
        self._graphs: DecodeGraphs | None = None
        self._programs: StepPrograms | None = None
        kinds = cache.kinds[first_layer : first_layer + span.num_blocks]
        if with_replay and form is Form.PACKED and span.device.type != "cuda" and span.quantization == "none":
            self._programs = StepPrograms(span)
        if with_replay and form is Form.PACKED and span.device.type == "cuda":
            if kernel is not None and all(suits(kind) for kind in kinds):
                self._graphs = DecodeGraphs(span, cache, first_layer=first_layer, kernel=kernel)
            elif not any(kind.is_chunked for kind in kinds):
                self._graphs = DecodeGraphs(span, cache, first_layer=first_layer, kernel=gathered.attend)

    @property
    def can_replay(self) -> bool:
        """Whether turns of few tokens are replayed; False once recording has failed."""
        replay = self._graphs or self._programs
        return replay is not None and not replay.is_broken

    def is_quick(self, num_tokens: int) -> bool:
        """Whether a turn of so many tokens is a recorded program, computed by the calling thread alone."""
        programs = self._programs
        return (
            programs is not None
            and num_tokens <= _FEW_TOKENS
            and self.threads.decode == 1
            and programs.holds(num_tokens)
        )

    @property
    def quick_trace(self) -> LoneTrace | None:
        """What computes the next token of one row in the calling thread alone, if anything does."""
        return self._programs.trace if self._programs is not None and self.threads.decode == 1 else None

    def run(self, parts: Sequence[Part]) -> None:
        """Compute the parts, and give each its output."""
        with torch.inference_mode():
            if len(parts) != 1 or not self._run_lone(parts[0]):
                self._run(parts)

    def _run_lone(self, part: Part) -> bool:
        """Compute a single token of a plain session by the trace, if there is one: without what a turn needs else."""
        programs, work = self._programs, part.request
        assert isinstance(work, StepWork)
        if programs is None or not programs.is_traced or part.num_tokens != 1 or part.copies or not work.is_plain:
            return False
        (row,) = part.rows
        self.threads.apply(Urgency.DECODE)
        hidden_TH = work.received_TH if work.num_tokens == 1 else work.received_TH[row.start : row.start + 1]
        hidden_TH = hidden_TH.to(device=self.span.device, dtype=self.span.dtype)
        output_TH = programs.run_lone(hidden_TH, work.row_position(row), row)
        if output_TH is None:
            return False
        work.put(row.start, output_TH.cpu())
        return True

    def _run(self, parts: Sequence[Part]) -> None:
        works = [part.request for part in parts]
        inputs, positions, rows, changes = [], [], [], []
        copies: list[PageCopy] = []
        for part, work in zip(parts, works, strict=True):
            assert isinstance(work, StepWork)
            copies += part.copies
            if not part.rows:
                continue
            inputs.append(work.received_TH[part.rows[0].start : part.rows[0].start + part.num_tokens])
            for row in part.rows:
                rows.append(row)
                positions.append(work.row_positions(row))
                changes.append(RowChange(prompts=work.session.prompts, adapters=work.session.adapters))
        if copies:
            self.cache.copy_pages(copies)
        if not rows:
            return
        num_tokens = sum(row.count for row in rows)
        self.threads.apply(Urgency.DECODE if num_tokens <= _FEW_TOKENS else Urgency.BULK)
        hidden_TH = inputs[0] if len(inputs) == 1 else torch.cat([each.to(self.span.dtype) for each in inputs])
        hidden_TH = hidden_TH.to(device=self.span.device, dtype=self.span.dtype)
        positions_T = positions[0] if len(positions) == 1 else np.concatenate(positions)
        output_TH = self.compute(hidden_TH, positions_T, rows, changes).cpu()
        start = 0
        for part, work in zip(parts, works, strict=True):
            if part.rows:
                assert isinstance(work, StepWork)
                work.put(part.rows[0].start, output_TH[start : start + part.num_tokens])
                start += part.num_tokens

    def compute(
        self,
        hidden_TH: torch.Tensor,
        positions_T: NDArray[np.int64],
        rows: Sequence[RowPart],
        changes: Sequence[RowChange],
    ) -> torch.Tensor:
        """Hidden states of rows, on the device, through the span; the result may be overwritten by the next turn."""
        is_plain = all(change.is_empty for change in changes)
        if is_plain and self._graphs is not None and self._graphs.fits(rows):
            try:
                return self._graphs.run(hidden_TH, positions_T, rows)
            except RuntimeError as error:
                _note_failure(error)
        batch = Batch(rows, self.cache, first_layer=self.first_layer, kernel=self._kernel)
        if is_plain and self._programs is not None and self._programs.fits(hidden_TH.shape[0]):
            try:
                return self._programs.run(hidden_TH, torch.from_numpy(positions_T).to(hidden_TH.device), batch)
            except RecordingError as error:
                _note_failure(error)
        if self.form is Form.PADDED:
            return compute_padded(self.span, batch, hidden_TH, positions_T, changes)
        positions_1T = torch.from_numpy(positions_T).to(hidden_TH.device)[None]
        with active(batch), changed(self.span, rows, changes):
            return self.span.forward_packed(hidden_TH[None], positions_1T, attention=attention.NAME)[0]


def _note_failure(error: Exception) -> None:
    log.warning("a decode step could not be recorded: %s", first_line(error))


@final
class StepWork(Work[tuple[EncodedStates, ...]]):
    """A session's next step, or several that amount to one, which shares its turns with those of others."""

    def __init__(
        self,
        session: SessionState,
        runner: StepRunner,
        states: InputStates,
        *,
        keep: int,
        row_order: tuple[int, ...] | None,
        deadline_s: float,
        max_turn_tokens: int,
        peer_id: PeerId | None = None,
    ) -> None:
        super().__init__(
            urgency=Urgency.DECODE if max(states.row_tokens) <= MAX_DECODE_COLUMNS else Urgency.BULK,
            num_tokens=sum(states.row_tokens),
            deadline_s=deadline_s,
            peer_id=peer_id,
            session=session,
            key=runner,
            max_turn_tokens=max_turn_tokens,
        )
        self.session: SessionState = session
        self.received_TH: torch.Tensor
        self._runner = runner
        self._states = states
        self._keep = keep
        self._row_order = row_order
        self._positions_T: NDArray[np.int64] | None = None
        self._output_TH: torch.Tensor | None = None
        self._has_begun = False
        self._lengths: list[int] = []
        """Tokens of each row before this step."""

    @property
    def is_heavy(self) -> bool:
        return self._states.is_heavy

    @property
    def is_quick(self) -> bool:
        return self.urgency is Urgency.DECODE and self._runner.is_quick(self.num_tokens)

    def prepare(self) -> None:
        self.received_TH = self._states.decode()
        self._positions_T = self._states.positions()

    def take(self, count: int) -> Take | None:
        copies: list[PageCopy] = []
        session = self.session
        if not self._has_begun:
            begun = session.begin(self._keep, self._row_order, self._states.row_tokens)
            if begun is None:
                return None
            session.is_broken = True  # until the step is complete
            self._lengths, copies = begun
            self._has_begun = True
        rows = []
        for row, start, offset, taken in self._slices(count):
            past = self._lengths[row] + offset
            windowed = session.pages.grow_window(row, past, taken)
            if windowed is None:
                return None
            copies += windowed
            rows.append(RowPart(row=row, start=start, count=taken, past=past, runs=session.pages.runs(row)))
        return Take(rows=tuple(rows), copies=tuple(copies))

    def _slices(self, count: int) -> list[tuple[int, int, int, int]]:
        """The next ``count`` tokens by rows: (row, first packed token, first token of the step's row, tokens)."""
        slices = []
        row_start = 0
        first, end = self.num_done, self.num_done + count
        for row, row_tokens in enumerate(self._states.row_tokens):
            low, high = max(first, row_start), min(end, row_start + row_tokens)
            if low < high:
                slices.append((row, low, low - row_start, high - low))
            row_start += row_tokens
        return slices

    def passed(self, rows: tuple[RowPart, ...]) -> None:
        for row in rows:
            self.session.pages.slide(row.row, row.past + row.count)
        if not self.num_tokens_left:
            self.session.is_broken = False

    @property
    def is_plain(self) -> bool:
        """Whether the session changes nothing in the span."""
        return self.session.prompts is None and not self.session.adapters

    def row_position(self, row: RowPart) -> int:
        """Position id of the first of some tokens."""
        return row.past if self._positions_T is None else int(self._positions_T[row.start])

    def row_positions(self, row: RowPart) -> NDArray[np.int64]:
        """Position ids of some tokens."""
        if self._positions_T is not None:
            return self._positions_T[row.start : row.start + row.count]
        return np.arange(row.past, row.past + row.count)

    def put(self, start: int, output_TH: torch.Tensor) -> None:
        """Keep the span's output for the tokens from ``start`` on."""
        if output_TH.shape[0] == self.num_tokens:
            self._output_TH = output_TH
            return
        if self._output_TH is None:
            self._output_TH = output_TH.new_empty(self.num_tokens, output_TH.shape[1])
        self._output_TH[start : start + output_TH.shape[0]] = output_TH

    def advance_together(self, parts: Sequence[Part]) -> None:
        self._runner.run(parts)

    def result(self) -> tuple[EncodedStates, ...]:
        return self._states.encode(self.received_TH if self._output_TH is None else self._output_TH)
