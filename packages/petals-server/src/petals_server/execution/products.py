"""Attention of many new tokens in float32 on CPUs, multiplied by oneDNN where that is faster than torch's fused kernel.

The fused kernel multiplies by MKL, as torch's linear layers do (``linear``). Here the scores of a head of keys are in
memory as a whole, so that very long rows are left to torch. Results differ in the last bits.

Letters: H heads, G heads of keys, N new tokens, K tokens that they attend to, D width of a head.
"""

# ruff: noqa: N803 -- tensors are named by their shape

from __future__ import annotations

from typing import Final

import torch

from petals_server.execution import linear

_MIN_SCORES: Final = 1 << 15
"""Of a head of keys: for fewer, finding kernels and copying keys takes longer than is won (16 to 32 heads of 64 to 128,
17 to 512 new tokens, 33 to 2,600 keys)."""
_MAX_SCORES: Final = 1 << 24
"""Of a head of keys: 64 MiB."""


def suits(query_HND: torch.Tensor, keys_GKD: torch.Tensor) -> bool:
    """Whether :func:`attend` can attend, and does so faster."""
    num_scores = query_HND.shape[0] // keys_GKD.shape[0] * query_HND.shape[1] * keys_GKD.shape[1]
    return (
        _MIN_SCORES <= num_scores <= _MAX_SCORES
        and query_HND.dtype is torch.float32
        and query_HND.device.type == "cpu"
        and linear.is_faster()
    )


def attend(
    query_HND: torch.Tensor, keys_GKD: torch.Tensor, values_GKD: torch.Tensor, mask_NK: torch.Tensor, scale: float
) -> torch.Tensor:
    """A row's attention [H, N, D], under ``inference_mode``; ``mask_NK`` is added to the scores."""
    num_heads, num_new, size = query_HND.shape
    num_groups, num_keys, value_size = values_GKD.shape
    per_group = num_heads // num_groups
    folded = (query_HND * scale).reshape(num_groups, per_group * num_new, size)
    output = torch.empty(num_groups, per_group * num_new, value_size)
    for group in range(num_groups):
        scores = linear.product(folded[group], keys_GKD[group].contiguous())
        scores.view(per_group, num_new, num_keys).add_(mask_NK)
        shares = torch.softmax(scores, dim=-1, out=scores)
        output[group] = linear.product(shares, values_GKD[group].contiguous().t())
    return output.view(num_heads, num_new, value_size)
