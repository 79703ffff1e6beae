"""Decode steps as recorded graphs: a turn of single tokens is replayed instead of launched kernel by kernel.

A graph reads its inputs from the same memory each time, so it has buffers for a number of rows and of their pages; what
is left is filled up with rows that belong to nobody and write to page 0. One is recorded for each size when it is first
wanted; all share the memory that they compute in.

Letters: R rows, which have one token each, H hidden size, M pages of the longest row.
"""

# ruff: noqa: N802, N803, N815 -- tensors are named by their shape

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from petals_core.models.span import Span
from petals_server.cache.tensors import CacheTensors, LayerKind
from petals_server.execution import attention
from petals_server.execution.batch import Batch, active, row_slots
from petals_server.execution.varlen import Kernel, PagedRows, page_table
from petals_server.scheduling.plan import RowPart

log = logging.getLogger(__name__)

SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows for which graphs are made."""
WIDTHS: Final = (512, 2048, 8192)
"""Tokens of the longest row for which graphs are made; longer rows are computed without."""

Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""From a computation to one that does the same again in the same memory."""


class CudaRecorder:
    """Records computations on CUDA; what they need beside their inputs is shared, so they run one after another."""

    def __init__(self) -> None:
        self._memory: Any = None

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record a computation; raises ``RuntimeError`` if it does anything that a graph can't hold."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries set themselves up when they are first used
                compute()
        torch.cuda.current_stream().wait_stream(side)
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            output = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffers:
    """What a graph of a size reads."""

    hidden_RH: torch.Tensor
    positions_1R: torch.Tensor
    slots: tuple[torch.Tensor, ...]
    """For each group int64 [R]."""
    rows: tuple[PagedRows, ...]
    """For each group."""


class _StaticBatch(Batch):
    """A batch whose layout is in buffers."""

    def __init__(self, buffers: _Buffers, cache: CacheTensors, *, first_layer: int, kernel: Kernel) -> None:
        super().__init__((), cache, first_layer=first_layer, kernel=kernel)
        self.num_tokens = buffers.hidden_RH.shape[0]
        self._buffers = buffers

    def slots_T(self, group: int) -> torch.Tensor:
        return self._buffers.slots[group]

    def paged(self, group: int) -> PagedRows:
        return self._buffers.rows[group]

    def uses_kernel(self, kind: LayerKind) -> bool:
        return True


class DecodeGraphs:
    """Graphs of one span. Used in the device's thread."""

    def __init__(
        self,
        span: Span,
        cache: CacheTensors,
        *,
        first_layer: int,
        kernel: Kernel,
        record: Record | None = None,
    ) -> None:
        self._span = span
        self._cache = cache
        self._first_layer = first_layer
        self._kernel = kernel
        self._record = CudaRecorder() if record is None else record
        self._graphs: dict[tuple[int, int], tuple[_Buffers, Callable[[], torch.Tensor]]] = {}
        """By the numbers of rows and of tokens that they are for."""
        self.is_broken = False
        """Recording failed once: blocks do something that no graph holds."""

    def fits(self, rows: Sequence[RowPart]) -> bool:
        """Whether there is, or will be, a graph for these rows."""
        return (
            not self.is_broken
            and len(rows) <= SIZES[-1]
            and all(row.count == 1 and row.past < WIDTHS[-1] for row in rows)
        )

    def run(self, hidden_RH: torch.Tensor, positions_R: NDArray[np.int64], rows: Sequence[RowPart]) -> torch.Tensor:
        """Compute a turn of rows that :meth:`fits`; the result is overwritten by the next one.

        Raises:
            RuntimeError: recording failed.
        """
        longest = max(row.past + 1 for row in rows)
        key = next(size for size in SIZES if size >= len(rows)), next(width for width in WIDTHS if width >= longest)
        if key not in self._graphs:
            self._graphs[key] = self._make(*key)
        buffers, replay = self._graphs[key]
        self._fill(buffers, hidden_RH, positions_R, rows)
        return replay()[: len(rows)]

    def _make(self, size: int, num_tokens: int) -> tuple[_Buffers, Callable[[], torch.Tensor]]:
        span, device = self._span, self._cache.keys_SGD[0].device
        width = -(-num_tokens // self._cache.page_tokens)
        num_groups = max(self._cache.group_of) + 1

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        lengths, starts_k = integers(size) + 1, starts.clone()
        buffers = _Buffers(
            hidden_RH=torch.zeros(size, span.hidden_size, dtype=span.dtype, device=device),
            positions_1R=torch.zeros(1, size, dtype=torch.int64, device=device),
            slots=tuple(torch.zeros(size, dtype=torch.int64, device=device) for _ in range(num_groups)),
            rows=tuple(
                PagedRows(
                    starts_q=starts,
                    starts_k=starts_k,
                    lengths=lengths,
                    pages_RM=integers(size, width),
                    max_new=1,
                    max_length=width * self._cache.page_tokens,
                )
                for _ in range(num_groups)
            ),
        )
        batch = _StaticBatch(buffers, self._cache, first_layer=self._first_layer, kernel=self._kernel)

        def compute() -> torch.Tensor:
            with active(batch):
                return span.forward_packed(buffers.hidden_RH[None], buffers.positions_1R, attention=attention.NAME)[0]

        started_s = time.perf_counter()
        try:
            replay = self._record(compute)
        except Exception as error:  # whatever blocks do that no graph holds
            self.is_broken = True
            raise RuntimeError(str(error) or type(error).__name__) from error
        log.debug(
            "recorded a decode step of %d rows of %d tokens in %.2f s",
            size,
            num_tokens,
            time.perf_counter() - started_s,
        )
        return buffers, replay

    def _fill(
        self, buffers: _Buffers, hidden_RH: torch.Tensor, positions_R: NDArray[np.int64], rows: Sequence[RowPart]
    ) -> None:
        size, page_tokens = buffers.hidden_RH.shape[0], self._cache.page_tokens
        count = len(rows)
        buffers.hidden_RH[:count].copy_(hidden_RH)
        positions = np.zeros((1, size), dtype=np.int64)
        positions[0, :count] = positions_R
        buffers.positions_1R.copy_(torch.from_numpy(positions))
        lengths = np.ones(size, dtype=np.int32)
        lengths[:count] = [row.past + 1 for row in rows]
        buffers.rows[0].lengths.copy_(torch.from_numpy(lengths))
        buffers.rows[0].starts_k[1:].copy_(torch.from_numpy(np.cumsum(lengths, dtype=np.int32)))
        for group, (slots, paged) in enumerate(zip(buffers.slots, buffers.rows, strict=True)):
            places = np.zeros(size, dtype=np.int64)
            for index, row in enumerate(rows):
                places[index : index + 1] = row_slots(row.runs[group], row.past, row.past + 1, page_tokens)
            slots.copy_(torch.from_numpy(places))
            width = max(-(-(row.past + 1) // page_tokens) for row in rows)
            table = np.zeros((size, width), dtype=np.int32)
            table[:count] = page_table(rows, group, page_tokens, width)
            paged.pages_RM[:, :width].copy_(torch.from_numpy(table))
