"""How much memory is free, and what a span takes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import torch

from petals_core.errors import NotEnoughMemoryError
from petals_core.models.span import Span
from petals_core.models.transformers_private import attention_name

MIB: Final = 1024 * 1024
_HEADROOM_SHARE: Final = 0.1
_MIN_HEADROOM_BYTES: Final = 256 * MIB
_CACHE_SHARE: Final = 0.25
"""Of what is free before loading: set aside for the attention cache."""
_CGROUP: Final = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory of the device that this process may still take, with headroom for everything else left out.

    It is free memory that counts, not the total; for the CPU also what the control group (a container) leaves.
    """
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = psutil.virtual_memory().available
        left = _cgroup_bytes_left()
        if left is not None:
            free = min(free, left)
    return max(0, free - max(_MIN_HEADROOM_BYTES, int(free * _HEADROOM_SHARE)))


def _cgroup_bytes_left() -> int | None:
    """What the control group of this process allows beyond its present use (Linux, version 2); None: no bound."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # The file cache counts as used but is given up when memory is short.
        return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def count_blocks_that_fit(block_bytes: int, free: int) -> int:
    """How many blocks of that size fit, with room left for the attention cache."""
    return int(free * (1 - _CACHE_SHARE)) // max(1, block_bytes)


def check_fits(num_blocks: int, block_bytes: int, free: int) -> None:
    """Make sure that there is memory for the blocks.

    Raises:
        NotEnoughMemoryError: there is not.
    """
    if num_blocks * block_bytes > free:
        raise NotEnoughMemoryError(
            f"{num_blocks} blocks take {num_blocks * block_bytes / MIB:,.0f} MiB and {free / MIB:,.0f} MiB are free: "
            f"serve at most {free // max(1, block_bytes)} with --num-blocks, or free memory"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCost:
    """Memory that a session takes in all blocks of a span."""

    token_bytes: int
    """For each of a row's tokens."""
    state_tokens: int
    """What a row takes beside its tokens, in units of these: recurrent states and a copy of them."""


def measure_cache_cost(span: Span) -> CacheCost:
    """Measure what sessions will take, by computing one token."""
    token_bytes, state_bytes = span.measure_cache_bytes()
    if span.is_recurrent:  # a session also keeps what went into the span, to go back
        token_bytes += span.hidden_size * span.dtype.itemsize
    return CacheCost(token_bytes=token_bytes, state_tokens=math.ceil(2 * state_bytes / max(1, token_bytes)))


def choose_max_scores(span: Span, free: int) -> int:
    """Pairs of tokens whose attention scores an eighth of free memory holds.

    Only models without fused attention keep a score per pair and head, with two copies; others keep a mask.
    """
    keeps_scores = attention_name(span.config) == "eager"
    pair_bytes = 12 * int(span.config.num_attention_heads) if keeps_scores else 4
    return max(1, free // 8 // pair_bytes)


def choose_cache_tokens(token_bytes: int, free: int) -> int:
    """Tokens of attention cache that free memory holds, half of it left for computing.

    Growing a cache holds its old and its new form for a moment, and so do activations of large requests.
    """
    return max(1, free // 2 // max(1, token_bytes))
