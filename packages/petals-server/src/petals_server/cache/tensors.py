"""The tensors of the attention cache's pages.

Letters: S token slots of a pool, P pages, L tokens of a page, G heads of keys, D their width.
Keys and values may differ in width.
"""

# ruff: noqa: N803 -- tensors are named by their shape

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from petals_server.cache.pages import CachePages, PageCopy

CPU_PAGE_TOKENS: Final = 16
CUDA_PAGE_TOKENS: Final = 256
"""What the paged kernels of flash attention 2 ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What a block keeps of a token, and what a token sees there."""

    num_heads: int
    """Of keys and values."""
    key_size: int
    value_size: int
    window: int | None
    """Tokens that a token sees, itself included; None: all before it."""
    is_chunked: bool = False
    """Whether the window is a chunk, aligned to multiples of its length, instead of one that slides."""

    @property
    def token_elements(self) -> int:
        """Elements that the cache keeps of a token."""
        return self.num_heads * (self.key_size + self.value_size)


class CacheTensors:
    """Keys and values of all pages, a pair of tensors per block. Used in the device's thread.

    On a CPU memory is only taken when a page is first written: the system gives it out page by page.
    """

    def __init__(
        self, kinds: Sequence[LayerKind], pages: CachePages, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kinds = tuple(kinds)
        self.page_tokens = pages.page_tokens
        windows = [group.window for group in pages.groups]
        self.group_of = tuple(windows.index(kind.window) for kind in kinds)
        seen = [(kind.window, kind.is_chunked) for kind in kinds]
        self.kind_of = tuple(map(seen.index, seen))
        """For each block the first one whose tokens see the same."""
        self.keys_SGD: list[torch.Tensor] = []
        self.values_SGD: list[torch.Tensor] = []
        for kind, group in zip(kinds, self.group_of, strict=True):
            num_slots = (pages.groups[group].num_pages + 1) * self.page_tokens
            for tensors, size in ((self.keys_SGD, kind.key_size), (self.values_SGD, kind.value_size)):
                tensor = torch.empty(num_slots, kind.num_heads, size, dtype=dtype, device=device)
                tensor[: self.page_tokens] = 0  # the page that stands for what nobody wrote
                tensors.append(tensor)

    def paged(self, tensor_SGD: torch.Tensor) -> torch.Tensor:
        """A pool's tensor as [P, L, G, D]."""
        return tensor_SGD.view(-1, self.page_tokens, *tensor_SGD.shape[1:])

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy pages; all are read before one is written."""
        for group in {copy.group for copy in copies}:
            pairs = [(copy.source, copy.target) for copy in copies if copy.group == group]
            device = self.keys_SGD[0].device
            sources = torch.tensor([source for source, _ in pairs], device=device)
            targets = torch.tensor([target for _, target in pairs], device=device)
            for layer, layer_group in enumerate(self.group_of):
                if layer_group == group:
                    for tensor in (self.keys_SGD[layer], self.values_SGD[layer]):
                        paged = self.paged(tensor)
                        paged[targets] = paged[sources]
