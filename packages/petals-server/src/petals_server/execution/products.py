"""Attention of many new tokens in float32 on CPUs, multiplied by oneDNN where that is faster than torch's fused kernel.

The fused kernel multiplies by MKL, as torch's linear layers do (``linear``). Here some new tokens at a time have their
scores in memory, and never those with keys that come after them; very long rows are left to torch. Results differ in
the last bits. ``tools/bench_parts.py`` prints what parts of a prompt take; docs/benchmarks.md has the figures.

Letters: H heads, G heads of keys, N new tokens, K tokens that they attend to, D width of a head.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

from typing import Final

import torch

from petals_server.execution import linear

_MIN_SCORES: Final = 1 << 15
"""Of a head of keys: for fewer, finding kernels and copying keys takes longer than is won (16 to 32 heads of 64 to 128,
17 to 512 new tokens, 33 to 2,600 keys)."""
_TILE_SCORES: Final = 1 << 19
"""At most so many at a time, 2 MiB: more leave the processor's caches, fewer give oneDNN too little to multiply."""
_MIN_TILE_TOKENS: Final = 16
_MAX_SCORES: Final = 1 << 24
"""Of a head of keys and the fewest tokens: 64 MiB."""


def suits(query_HND: torch.Tensor, keys_GKD: torch.Tensor) -> bool:
    """Whether :func:`attend` can attend, and does so faster."""
    num_new = query_HND.shape[1]
    per_token = query_HND.shape[0] // keys_GKD.shape[0] * keys_GKD.shape[1]
    return (
        num_new * per_token >= _MIN_SCORES
        and min(num_new, _MIN_TILE_TOKENS) * per_token <= _MAX_SCORES
        and query_HND.dtype is torch.float32
        and query_HND.device.type == "cpu"
        and linear.is_faster()
    )


def attend(
    query_HND: torch.Tensor,
    keys_GKD: torch.Tensor,
    values_GKD: torch.Tensor,
    mask_NK: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """A row's attention [H, N, D], under ``inference_mode``: a token sees the keys up to its own, the last N ones.

    ``mask_NK`` is added to the scores where a token does not see all of these; None: it does.
    """
    num_heads, num_new, _ = query_HND.shape
    num_groups, num_keys, value_size = values_GKD.shape
    per_group, num_past = num_heads // num_groups, num_keys - num_new
    num_tiles = -(-num_new * per_group * num_keys // _TILE_SCORES)
    tile = max(_MIN_TILE_TOKENS, -(-num_new // num_tiles))
    later = torch.full((tile, tile), float("-inf")).triu_(1)
    output_NHD = torch.empty(num_new, num_heads, value_size)
    for group in range(num_groups):
        heads = slice(group * per_group, (group + 1) * per_group)
        keys_KD, values_KD = keys_GKD[group] * scale, values_GKD[group].contiguous()
        for start in range(0, num_new, tile):
            end = min(start + tile, num_new)
            count, seen = end - start, num_past + end
            scores = linear.product(query_HND[heads, start:end].reshape(per_group * count, -1), keys_KD[:seen])
            by_head = scores.view(per_group, count, seen)
            if mask_NK is None:
                by_head[:, :, -count:].add_(later[:count, :count])
            else:
                by_head.add_(mask_NK[start:end, :seen])
            torch.softmax(scores, dim=-1, out=scores)
            attended = linear.product(scores, values_KD[:seen].t()).view(per_group, count, value_size)
            output_NHD[start:end, heads] = attended.transpose(0, 1)
    return output_NHD.transpose(0, 1)
