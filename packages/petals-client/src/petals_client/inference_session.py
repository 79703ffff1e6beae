"""A session as its user sees it: an attention cache on the servers that lasts over several calls.

Letters: R rows, T columns of a step with pads, N tokens without pads, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.chain import Chain, ChainSession, StepRequest
from petals_client.columns import ColumnMap
from petals_client.hidden_states import SplitSession, StateCollector
from petals_client.packing import pack, read_layout, read_position_runs, unpack
from petals_client.prefix import Prefix, PrefixedSession
from petals_client.trace import StepTrace
from petals_core.errors import InvalidRequestError, PetalsError, SessionLengthError
from petals_core.models.transformers_forward import CountingCache

if TYPE_CHECKING:
    from types import TracebackType

DRAFT_COLUMNS = 16
"""Room behind ``max_length`` for drafted tokens that ``generate`` tries and takes back."""
_MAX_PARTS = 16
"""Of the known tokens, which each step extends: all are walked through each time, and copied when they are joined."""


class InferenceSession:
    """Columns of hidden states that were computed and are cached by the servers of a chain.

    Made by ``model.inference_session(max_length=...)``, used as a context manager. Within it ``model.generate`` and
    the model itself are given new tokens alone; ``session.cache`` may also be passed as ``past_key_values``. One thread
    at a time may use a session. The number of rows is that of the first step.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        start: int,
        end: int,
        max_length: int,
        adapt: Callable[[], Adaptation | None] = lambda: None,
    ) -> None:
        """``adapt`` says, at the first step, what changes the blocks for the session."""
        if max_length < 1:
            raise InvalidRequestError(f"max_length is {max_length}: a session holds at least 1 token")
        self.max_length = max_length
        """Columns that the session may hold, pads included."""
        self.start = start
        self.end = end
        self.cache = CountingCache(self)
        """What to pass as ``past_key_values``."""
        self._chain = chain
        self._adapt = adapt
        self._columns: ColumnMap | None = None
        self._remote: ChainSession | None = None
        self._row_order: tuple[int, ...] | None = None
        """Reordering that the servers have not been told yet."""
        self._tokens: list[Tensor] | None = []
        """Parts of ``output_ids``, put together when asked for; None: not known."""
        self._lost_mask: Tensor | None = None
        """What ``output_mask`` was when the session was lost."""
        self._lost: PetalsError | None = None
        self._is_closed = False
        self._draft_columns = 0
        self._in_use = threading.Lock()

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Columns that are cached. Setting it to less is ``truncate``."""
        return 0 if self._columns is None else self._columns.length

    @position.setter
    def position(self, length: int) -> None:
        self.truncate(length)

    @property
    def is_begun(self) -> bool:
        """Whether the servers hold a cache for it, if only an empty one."""
        return self._remote is not None

    @property
    def num_rows(self) -> int | None:
        """Rows of the batch; None before the first step."""
        return None if self._columns is None else self._columns.num_rows

    @property
    def output_ids(self) -> Tensor | None:
        """All tokens so far, prompts and pads included: int64 [R, columns]; None if they are not known.

        The last one that ``generate`` made is not cached yet. Tokens are not known when embeddings were passed.
        """
        if self._tokens and len(self._tokens) > 1:
            self._tokens = [torch.cat(self._tokens, dim=1)]
        return self._tokens[0] if self._tokens else None

    @property
    def output_mask(self) -> Tensor | None:
        """Which of ``output_ids`` are tokens and not pads: bool [R, columns]; None: all."""
        tokens = self.output_ids
        if tokens is None:
            return None
        if self._columns is None:
            return None if self._lost_mask is None else self._lost_mask[:, : tokens.shape[1]]
        masks = self._columns.masks()
        if masks is None:
            return None
        length = self.position
        bits = [[bool(mask >> column & 1) for column in range(length)] for mask in masks]
        missing = tokens.shape[1] - length
        return torch.nn.functional.pad(torch.tensor(bits), (0, missing), value=True)

    @property
    def has_pads(self) -> bool:
        """Whether any of the cached columns is a pad in some row."""
        return self._columns is not None and self._columns.masks() is not None

    def has_mask(self, mask: Tensor) -> bool:
        """Whether a mask [R, ``position``] is what the cached columns were computed with."""
        masks = None if self._columns is None else self._columns.masks()
        return read_layout(mask.shape[0], mask.shape[1], mask).masks == masks

    def is_of(self, chain: Chain, start: int, end: int) -> bool:
        """Whether this is a session on these blocks."""
        return self._chain is chain and (self.start, self.end) == (start, end)

    def trace(self) -> tuple[StepTrace, ...]:
        """Where the time of the last steps went, hop by hop (see ``petals_client.trace.format_trace``)."""
        return () if self._remote is None else self._remote.trace()

    # --- changing it --------------------------------------------------------------------------------------------------

    def truncate(self, length: int) -> None:
        """Forget everything behind the first ``length`` columns; the servers learn of it with the next step.

        Raises:
            InvalidRequestError: there are fewer columns, or pads on the right make the cut impossible.
        """
        tokens = self.output_ids
        held = max(self.position, 0 if tokens is None else tokens.shape[1])
        if not 0 <= length <= held:
            raise InvalidRequestError(f"the session holds {held} tokens and can't be cut to {length}")
        if self._columns is not None and length < self._columns.length:
            self._columns.truncate(length)
        if tokens is not None:
            self._tokens = [tokens[:, :length]] if length else []
        if length == 0:
            self._lost = None

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i go on from what row ``order[i]`` was (beam search); the servers learn of it with the next step."""
        if self._columns is None:
            return
        if len(order) != self._columns.num_rows:
            raise InvalidRequestError(
                f"the session has {self._columns.num_rows} rows and can't go on with {len(order)}: open another one"
            )
        order = tuple(order)
        self._columns.reorder(order)
        before = range(len(order)) if self._row_order is None else self._row_order
        composed = tuple(before[row] for row in order)
        self._row_order = None if composed == tuple(range(len(order))) else composed
        tokens = self.output_ids
        if tokens is not None:
            self._tokens = [tokens[list(order)]]

    def step(
        self,
        hidden: Tensor,
        *,
        valid: Tensor | None = None,
        position_ids: Tensor | None = None,
        collector: StateCollector | None = None,
        prefix: Prefix | None = None,
        num_wanted: int | None = None,
    ) -> Tensor:
        """Append T columns and return their hidden states behind the last block, on the same device in the same dtype.

        Args:
            hidden: hidden states before the first block.
            valid: nonzero where there is a token; None: everywhere. What comes back at pads is zero.
            position_ids: [R, T] or [1, T]; None: each row goes on from the number of its tokens.
            collector: is given the states between blocks that it wants.
            prefix: what stands before every row; counts in the first step only.
            num_wanted: of how many columns, the last ones, states are wanted; others may come back as zero. None: all.

        Raises:
            SessionLengthError: the columns do not fit ``max_length``.
            InvalidRequestError: the session is closed or lost, or another thread uses it.
            PetalsError: the servers failed; the session is lost, but ``generate`` can go on with it from its tokens.
        """
        if not self._in_use.acquire(blocking=False):
            raise InvalidRequestError("another thread uses this session: open one for each thread")
        try:
            return self._step(hidden, valid, position_ids, collector, prefix, num_wanted)
        finally:
            self._in_use.release()

    def _step(
        self,
        hidden: Tensor,
        valid: Tensor | None,
        position_ids: Tensor | None,
        collector: StateCollector | None,
        prefix: Prefix | None,
        num_wanted: int | None,
    ) -> Tensor:
        if self._is_closed:
            raise InvalidRequestError("this session is closed: open another one with model.inference_session()")
        if self._lost is not None:
            raise InvalidRequestError(
                f"this session was lost ({self._lost.message}); call generate to go on from its tokens, "
                "or session.truncate(0) to start anew"
            )
        if hidden.ndim != 3:
            raise InvalidRequestError(
                f"hidden states have the shape [rows, tokens, hidden size], not {list(hidden.shape)}"
            )
        num_rows, width, size = hidden.shape
        self._check_fit(num_rows, width)
        layout = read_layout(num_rows, width, valid)
        columns = self._columns
        if columns is None or self._remote is None:
            columns = ColumnMap(num_rows)
            self._remote = self._open(num_rows, collector, prefix, hidden.dtype)
            self._columns = columns
        remote = self._remote
        between = collector.bounds(self.start, self.end)[1:-1] if collector is not None else ()
        if between and not (isinstance(remote, SplitSession) and set(between) <= set(remote.bounds)):
            raise InvalidRequestError(
                "this session was opened without the hidden states between blocks: "
                "ask for the same output_hidden_states from its first step on, or outside of a session"
            )
        runs = None if position_ids is None else read_position_runs(position_ids, layout, columns.row_lengths)
        if layout.num_tokens == 0:
            columns.append(width, layout.masks)
            if collector is not None:
                collector.states.update(dict.fromkeys(between, torch.zeros_like(hidden)))
            return torch.zeros_like(hidden)
        request = StepRequest(
            keep=columns.server_length,
            row_tokens=layout.row_tokens,
            row_order=self._row_order,
            position_runs=runs,
        )
        packed = pack(hidden.detach(), layout).cpu()
        assert packed.shape == (layout.num_tokens, size)
        try:
            packed = remote.step(packed, request, num_wanted=num_wanted)
        except BaseException as error:
            # Nobody knows what the servers have done of it, an interrupt included.
            self._lose(error)
            raise
        self._row_order = None
        columns.append(width, layout.masks)
        if collector is not None and isinstance(remote, SplitSession):
            for block in between:
                collector.states[block] = unpack(remote.states[block].to(hidden.device), layout)
        return unpack(packed.to(hidden.device), layout)

    def _open(
        self, num_rows: int, collector: StateCollector | None, prefix: Prefix | None, dtype: torch.dtype
    ) -> ChainSession:
        max_length = self.max_length + DRAFT_COLUMNS
        adaptation = self._adapt()
        if prefix is not None:
            session = self._chain.open_session(
                start=self.start,
                end=self.end,
                num_rows=num_rows,
                max_length=max_length + prefix.num_tokens,
                prompts=None if prefix.prompts is None else prefix.prompts.detach().to("cpu", dtype),
                adaptation=adaptation,
            )
            return PrefixedSession(session, prefix)
        bounds = collector.bounds(self.start, self.end) if collector is not None else ()
        if len(bounds) > 2:
            return SplitSession(self._chain, bounds, num_rows=num_rows, max_length=max_length, adaptation=adaptation)
        return self._chain.open_session(
            start=self.start, end=self.end, num_rows=num_rows, max_length=max_length, adaptation=adaptation
        )

    def _check_fit(self, num_rows: int, width: int) -> None:
        if self._columns is not None and num_rows != self._columns.num_rows:
            raise InvalidRequestError(
                f"the session has {self._columns.num_rows} rows and can't go on with {num_rows}: open another one"
            )
        if self.position + width > self.max_length + self._draft_columns:
            raise SessionLengthError(
                f"{self.position} cached and {width} new tokens do not fit the session's max_length of "
                f"{self.max_length}: open it with a larger max_length, or shorten the prompt"
            )

    # --- for generate -------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """After a loss: be an empty session again that still knows its tokens, so that ``generate`` recomputes them."""
        self._lost = None

    def keep_common_prefix(self, tokens: Tensor) -> None:
        """Forget the cached columns from the first one on that differs from ``tokens``; at least its last stays out.

        The last token of a sequence has to be computed for its logits, also when it is cached.
        """
        columns = self._columns
        if columns is None:
            return
        length = min(columns.length, tokens.shape[1] - 1)
        known = self.output_ids
        if known is not None and known.shape[0] == tokens.shape[0]:
            length = min(length, known.shape[1])
            differs = (known[:, :length] != tokens[:, :length].to(known.device)).any(dim=0).nonzero()
            if len(differs):
                length = int(differs[0])
        if length < columns.length:
            columns.truncate(length)

    def note_tokens(self, tokens: Tensor | None, past: int) -> None:
        """Remember which tokens stand in the columns from ``past`` on; None: nobody knows."""
        if tokens is None:
            self._tokens = None
            return
        if self._tokens is None:
            if past:
                return
            self._tokens = []
        if len(self._tokens) > _MAX_PARTS:
            self._tokens = [torch.cat(self._tokens, dim=1)]
        known = sum(part.shape[1] for part in self._tokens)
        if known > past:
            before = self.output_ids
            assert before is not None
            self._tokens = [before[:, :past]] if past else []
        elif known < past:
            self._tokens = None
            return
        self._tokens.append(tokens.detach().clone())

    def set_output(self, sequences: Tensor) -> None:
        """Remember the tokens that ``generate`` returned; its callers may have left out what was cached before."""
        missing = self.position + 1 - sequences.shape[1]
        if missing <= 0:
            self._tokens = [sequences.detach().clone()]
        elif self._tokens and (before := self.output_ids) is not None and before.shape[1] >= missing:
            self._tokens = [before[:, :missing], sequences.detach().clone()]
        else:
            self._tokens = None

    # --- losing it ----------------------------------------------------------------------------------------------------

    def _lose(self, error: BaseException) -> None:
        self._lost = error if isinstance(error, PetalsError) else PetalsError("a step was interrupted")
        self._lost_mask = self.output_mask
        self._drop_remote()

    def _drop_remote(self) -> None:
        remote, self._remote = self._remote, None
        self._columns = None
        self._row_order = None
        if remote is not None:
            remote.close()

    # --- its life -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the servers' caches; idempotent, also after a failure."""
        self._is_closed = True
        self._drop_remote()

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Undo the columns that were added inside, if it fails while the session itself is sound.

        Inside, ``DRAFT_COLUMNS`` more than ``max_length`` fit, because drafts may reach beyond what will be kept.
        """
        before, tokens, mask = self.position, self.output_ids, self.output_mask
        self._draft_columns = DRAFT_COLUMNS
        try:
            yield
        except BaseException:
            if self._lost is None and self.position > before:
                assert self._columns is not None
                self._columns.truncate(before)  # a boundary between steps, so never in the middle of pads
            self._tokens = None if tokens is None and before else [] if tokens is None else [tokens]
            if self._lost is not None:
                self._lost_mask = mask
            raise
        finally:
            self._draft_columns = 0
