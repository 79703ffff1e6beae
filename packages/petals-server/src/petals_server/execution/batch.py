"""The layout of a turn: which tokens of the packed row belong to which row of which session, and where their cache is.

Computed once in a turn and read by every block, whose attention finds it by :func:`current`.

Letters: T tokens of the packed row, S token slots of a pool, K tokens that a row attends to.
"""

# ruff: noqa: N802 -- tensors are named by their shape

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from petals_server.cache.pages import PageRun
from petals_server.cache.tensors import CacheTensors, LayerKind
from petals_server.execution.varlen import Kernel, PagedRows, lay_out, suits
from petals_server.scheduling.plan import RowPart


@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """What a row's new tokens attend to in blocks of one kind."""

    start: int
    """Of its tokens in the packed row."""
    count: int
    slots: slice | torch.Tensor
    """Where its keys are in the pool, its new ones included: in one piece, or int64 [K]."""
    is_causal: bool
    """Whether nothing but its new tokens is there, each of which sees those up to itself."""
    mask: torch.Tensor | None
    """What is added to scores [count, K]; None: each token sees all, or ``is_causal``."""
    sees_past: bool = True
    """Whether each of its new tokens sees all keys up to its own."""


class Batch:
    """A turn's rows, in the order of their tokens in the packed row."""

    def __init__(
        self,
        rows: Sequence[RowPart],
        cache: CacheTensors,
        *,
        first_layer: int,
        kernel: Kernel | None = None,
    ) -> None:
        """
        Args:
            first_layer: where in the cache the blocks of the span begin that is to be computed.
            kernel: attends for all rows at once where it can; None: row by row.
        """
        self.rows = rows
        self.cache = cache
        self.first_layer = first_layer
        self.kernel = kernel
        self.num_tokens = sum(row.count for row in rows)
        self._slots_T: dict[int, torch.Tensor] = {}
        self._paged: dict[int, PagedRows] = {}
        self._views: dict[int, list[RowView]] = {}

    @property
    def device(self) -> torch.device:
        return self.cache.keys_SGD[0].device

    def uses_kernel(self, kind: LayerKind) -> bool:
        """Whether the kernel, if there is one, attends for blocks of this kind."""
        return suits(kind)

    def slots_T(self, group: int) -> torch.Tensor:
        """Where new keys go in the pool of a group: int64 [T]."""
        slots = self._slots_T.get(group)
        if slots is None:
            page_tokens = self.cache.page_tokens
            parts = [row_slots(row.runs[group], row.past, row.past + row.count, page_tokens) for row in self.rows]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts)
            slots = self._slots_T[group] = torch.from_numpy(array).to(self.device, non_blocking=True)
        return slots

    def paged(self, group: int) -> PagedRows:
        """The rows as the kernel wants them, for blocks of a group."""
        paged = self._paged.get(group)
        if paged is None:
            paged = self._paged[group] = lay_out(self.rows, group, self.cache.page_tokens, self.device)
        return paged

    def views(self, layer: int) -> list[RowView]:
        """What each row attends to in a block."""
        number = self.cache.kind_of[layer]
        views = self._views.get(number)
        if views is None:
            kind, group = self.cache.kinds[layer], self.cache.group_of[layer]
            views = self._views[number] = []
            start = 0
            for row in self.rows:
                views.append(self._view(row, start, kind, group))
                start += row.count
        return views

    def _view(self, row: RowPart, start: int, kind: LayerKind, group: int) -> RowView:
        end = row.past + row.count
        first = first_seen(row.past, kind)
        run = row.runs[group]
        slots: slice | torch.Tensor
        if run.is_consecutive:
            base = run.pages[0] * self.cache.page_tokens - run.first_token
            slots = slice(base + first, base + end)
        else:
            slots = torch.from_numpy(row_slots(run, first, end, self.cache.page_tokens)).to(self.device)
        is_causal, mask = False, None
        if row.count > 1:
            if row.past == 0 and (kind.window is None or row.count <= kind.window):
                is_causal = True
            else:
                dtype = self.cache.keys_SGD[0].dtype
                mask = causal_mask(row.past, row.count, first, kind, dtype=dtype, device=self.device)
        sees_past = first_seen(end - 1, kind) == first
        return RowView(start=start, count=row.count, slots=slots, is_causal=is_causal, sees_past=sees_past, mask=mask)


def first_seen(past: int, kind: LayerKind) -> int:
    """The first token that the token behind ``past`` others sees."""
    if kind.window is None:
        return 0
    if kind.is_chunked:
        return past // kind.window * kind.window
    return max(0, past - kind.window + 1)


def causal_mask(
    past: int, count: int, first: int, kind: LayerKind, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What is added to the scores of tokens ``past`` up to ``past + count`` with those from ``first`` on."""
    queries = torch.arange(past, past + count, device=device)[:, None]
    keys = torch.arange(first, past + count, device=device)[None]
    hidden = keys > queries
    if kind.window is not None:
        hidden |= queries // kind.window != keys // kind.window if kind.is_chunked else keys <= queries - kind.window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def row_slots(run: PageRun, start: int, end: int, page_tokens: int) -> NDArray[np.int64]:
    """Where a row's tokens ``start`` up to ``end`` are in the pool."""
    tokens = np.arange(start - run.first_token, end - run.first_token)
    if run.is_consecutive:
        return tokens + run.pages[0] * page_tokens
    pages = np.array(run.pages, dtype=np.int64)
    slots: NDArray[np.int64] = pages[tokens // page_tokens] * page_tokens + tokens % page_tokens
    return slots


_state = threading.local()


@contextmanager
def active(batch: Batch) -> Iterator[None]:
    """Let this thread's blocks compute a batch."""
    _state.batch = batch
    try:
        yield
    finally:
        _state.batch = None


def current() -> Batch | None:
    """The batch that this thread computes; None: something that is not a packed batch."""
    batch: Batch | None = getattr(_state, "batch", None)
    return batch
