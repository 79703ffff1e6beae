"""Paged attention on CUDA: all rows of a batch in one call of ``torch.nn.attention.varlen.varlen_attn``.

That function reads keys and values from the pool through a table of each row's pages, so nothing is gathered. Which of
its arguments a build of torch has, and whether its kernels run on the device at hand, is found out by trying: what it
gives is compared with plain attention before it is used.

Letters: R rows, T tokens of the packed row, H heads, G heads of keys, D their width; P pages, L tokens of a page, M
pages of the longest row.
"""

# ruff: noqa: N803, N806, N815 -- tensors are named by their shape

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch.nn import functional

from petals_core.errors import first_line
from petals_server.cache.tensors import LayerKind
from petals_server.scheduling.plan import RowPart

log = logging.getLogger(__name__)

_MAX_HEAD_SIZE: Final = 256
_TOLERANCE: Final = 0.02
"""Between two kernels in bfloat16 or float16, of values around 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRows:
    """Where the rows of a batch are, for blocks of one group: int32 on the device."""

    starts_q: torch.Tensor
    """[R + 1], of each row in the packed row."""
    starts_k: torch.Tensor
    """[R + 1], sums of ``lengths``."""
    lengths: torch.Tensor
    """[R], tokens of each row, new ones included."""
    pages_RM: torch.Tensor
    max_new: int
    max_length: int


def lay_out(rows: Sequence[RowPart], group: int, page_tokens: int, device: torch.device) -> PagedRows:
    """The rows of a batch as the kernel wants them."""
    lengths = np.array([row.past + row.count for row in rows], dtype=np.int32)
    counts = np.array([row.count for row in rows], dtype=np.int32)
    table = page_table(rows, group, page_tokens, -(-int(lengths.max()) // page_tokens))
    starts_q, starts_k = (np.concatenate([[0], np.cumsum(each)]).astype(np.int32) for each in (counts, lengths))
    tensors = [torch.from_numpy(each).to(device, non_blocking=True) for each in (starts_q, starts_k, lengths, table)]
    return PagedRows(
        starts_q=tensors[0],
        starts_k=tensors[1],
        lengths=tensors[2],
        pages_RM=tensors[3],
        max_new=int(counts.max()),
        max_length=int(lengths.max()),
    )


def page_table(rows: Sequence[RowPart], group: int, page_tokens: int, width: int) -> Any:
    """Each row's pages, int32 [R, ``width``]; pages that it has not or no longer are page 0, which nobody reads."""
    table = np.zeros((len(rows), width), dtype=np.int32)
    for index, row in enumerate(rows):
        run = row.runs[group]
        first = run.first_token // page_tokens
        count = -(-(row.past + row.count) // page_tokens) - first
        table[index, first : first + count] = (
            np.arange(run.pages[0], run.pages[0] + count) if run.is_consecutive else run.pages[:count]
        )
    return table


class Kernel(Protocol):
    """Attention of all rows at once."""

    def __call__(
        self,
        query_THD: torch.Tensor,
        keys_PLGD: torch.Tensor,
        values_PLGD: torch.Tensor,
        rows: PagedRows,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """[T, H, D]; a row's tokens are its last ones and see those before them, of which ``window`` counts."""


def suits(kind: LayerKind) -> bool:
    """Whether the kernel knows what a block of this kind asks for."""
    return kind.key_size == kind.value_size <= _MAX_HEAD_SIZE and kind.key_size % 8 == 0 and not kind.is_chunked


def find_kernel(
    kinds: Sequence[LayerKind], *, dtype: torch.dtype, device: torch.device, page_tokens: int
) -> Kernel | None:
    """The kernel for a cache of these kinds of blocks, tried out; None where there is none that is right."""
    chosen = next((kind for kind in kinds if suits(kind)), None)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or chosen is None:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"block_table", "seqused_k"} <= inspect.signature(varlen_attn).parameters.keys():
        log.info("this torch has no paged attention")
        return None
    for with_starts in (False, True):
        kernel = _bind(varlen_attn, with_starts=with_starts)
        try:
            error = check_kernel(kernel, chosen, dtype=dtype, device=device, page_tokens=page_tokens)
        except Exception as failure:  # whatever a build of torch or a driver has against it
            log.info("paged attention: %s", first_line(failure))
            continue
        if error < _TOLERANCE:
            log.info("paged attention differs from plain attention by %.4f at most", error)
            return kernel
        log.warning("paged attention differs from plain attention by %.3f: not used", error)
    return None


def _bind(varlen_attn: Any, *, with_starts: bool) -> Kernel:
    def attend(
        query_THD: torch.Tensor,
        keys_PLGD: torch.Tensor,
        values_PLGD: torch.Tensor,
        rows: PagedRows,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        options = {}
        if query_THD.shape[1] != keys_PLGD.shape[2]:
            options["enable_gqa"] = True
        output: torch.Tensor = varlen_attn(
            query_THD,
            keys_PLGD,
            values_PLGD,
            rows.starts_q,
            rows.starts_k if with_starts else None,
            rows.max_new,
            rows.max_length,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            seqused_k=rows.lengths,
            block_table=rows.pages_RM,
            **options,
        )
        return output

    return attend


def check_kernel(
    kernel: Kernel, kind: LayerKind, *, dtype: torch.dtype, device: torch.device, page_tokens: int
) -> float:
    """The largest difference from plain attention, of rows with one and with several new tokens in scattered pages."""
    generator = torch.Generator(device=device).manual_seed(0)
    heads, size = 2 * kind.num_heads, kind.key_size
    pool = torch.randn(2, 8, page_tokens, kind.num_heads, size, generator=generator, dtype=dtype, device=device)
    lengths, counts = [page_tokens + 5, 3, 2 * page_tokens + 1], [1, 3, 4]
    pages = [[5, 2], [7], [1, 6, 3]]
    query_THD = torch.randn(sum(counts), heads, size, generator=generator, dtype=dtype, device=device)
    table = torch.zeros(3, 3, dtype=torch.int32)
    for row, each in enumerate(pages):
        table[row, : len(each)] = torch.tensor(each)
    worst = 0.0
    for window in (None, 7):
        rows = PagedRows(
            starts_q=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=device),
            starts_k=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            pages_RM=table.to(device),
            max_new=max(counts),
            max_length=max(lengths),
        )
        actual_THD = kernel(query_THD, pool[0], pool[1], rows, scale=size**-0.5, window=window)
        start = 0
        for length, count, own in zip(lengths, counts, pages, strict=True):
            keys, values = (each[own].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(2, 0) for each in pool)
            at = torch.arange(length - count, length, device=device)[:, None]
            seen = torch.arange(length, device=device)[None] <= at
            if window is not None:
                seen &= torch.arange(length, device=device)[None] > at - window
            expected = functional.scaled_dot_product_attention(
                query_THD[start : start + count].transpose(0, 1)[None].float(),
                keys[None].float(),
                values[None].float(),
                attn_mask=seen,
            )[0].transpose(0, 1)
            worst = max(worst, float((actual_THD[start : start + count].float() - expected).abs().max()))
            start += count
    return worst
