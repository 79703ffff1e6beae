"""Attention of single tokens whose keys and values are gathered to one width, by functions that every torch has.

No shape depends on how long rows are, so it can be recorded in a graph also where torch has no paged attention.

Letters: R rows, T tokens (one for each row), H heads, G heads of keys, D their width; P pages, L tokens of a page, M
pages of the widest row, K = M * L.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

import torch
from torch.nn import functional

from petals_server.execution.varlen import PagedRows


def attend(
    query_THD: torch.Tensor,
    keys_PLGD: torch.Tensor,
    values_PLGD: torch.Tensor,
    rows: PagedRows,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """[R, H, D of values]: a ``Kernel`` for batches whose rows have one new token each."""
    num_rows, num_heads, head_size = query_THD.shape
    num_groups = keys_PLGD.shape[2]
    pages = rows.pages_RM.flatten()
    at_K = torch.arange(rows.pages_RM.shape[1] * keys_PLGD.shape[1], device=query_THD.device)
    seen_RK = at_K < rows.lengths[:, None]
    if window is not None:
        seen_RK &= at_K >= rows.lengths[:, None] - window

    def gather(pool_PLGD: torch.Tensor) -> torch.Tensor:
        gathered_RKGD = pool_PLGD.index_select(0, pages).view(num_rows, len(at_K), num_groups, -1)
        # What a row doesn't see may be anybody's, also infinite: a mask alone would let that through.
        return gathered_RKGD.where(seen_RK[:, :, None, None], 0).transpose(1, 2)

    output = functional.scaled_dot_product_attention(
        query_THD.view(num_rows, num_groups, num_heads // num_groups, head_size),
        gather(keys_PLGD),
        gather(values_PLGD),
        attn_mask=seen_RK[:, None, None, :],
        scale=scale,
    )
    return output.reshape(num_rows, num_heads, -1)
