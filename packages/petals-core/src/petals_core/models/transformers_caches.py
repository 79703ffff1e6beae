"""Caches of spans, for what sessions keep.

Read against 5.23 (``cache_utils.py``).

Letters: R rows of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from petals_core.errors import InvalidRequestError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

_ATTENTION_TYPES: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Blocks whose state is keys and values per token, so that a cache can be cut back to any length."""
_RECURRENT_TYPES: Final = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Blocks with a state of fixed size (of a convolution, of a recurrence), beside keys and values or alone."""
_STATELESS_TYPES: Final = frozenset({"mlp", "moe"})


# --- kinds of blocks -------------------------------------------------------------------------------------------------


def layer_types(config: PreTrainedConfig) -> frozenset[str]:
    """The kinds of blocks that a config names; none where all are plain attention."""
    return frozenset(getattr(config, "layer_types", None) or ())


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether any block has a state that can't be cut back to fewer tokens."""
    return not layer_types(config).isdisjoint(_RECURRENT_TYPES)


def check_layer_types(config: PreTrainedConfig, *, is_stateful: bool) -> None:
    """Refuse blocks whose state is of a kind that sessions can't keep.

    ``_is_stateful`` is how Transformers marks models with a recurrent state.
    """
    name = config.model_type
    types = layer_types(config)
    others = types - _ATTENTION_TYPES - _RECURRENT_TYPES - _STATELESS_TYPES
    if others:
        raise UnsupportedModelError(
            f"{name} has blocks of type {', '.join(sorted(others))}, whose state is of an unknown kind: "
            "choose another model"
        )
    if is_stateful and not types & _RECURRENT_TYPES:
        raise UnsupportedModelError(f"{name} keeps a recurrent state of an unknown kind: choose another model")


# --- caches -----------------------------------------------------------------------------------------------------------


def new_cache(config: PreTrainedConfig) -> Cache:
    """A cache that keeps every token of every block, whatever windows the model has; masks do the windows.

    Without a config ``DynamicCache`` makes plain layers. Its sliding layers forget what leaves the window, which could
    not be cut back. Blocks with a recurrent state get the layers that Transformers has for them.
    """
    from transformers import DynamicCache

    return _recurrent_cache_class()(config) if is_recurrent(config) else DynamicCache()


@functools.cache
def _recurrent_cache_class() -> Any:
    """Made when it is first wanted, because importing ``Cache`` takes seconds."""
    from transformers import DynamicCache
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionCacheLayerMixin,
    )

    class RecurrentCache(DynamicCache):
        """A cache of which some layers hold states of fixed size, and that counts its tokens itself.

        A span may have no layer with keys, and Transformers tells the length by these.
        """

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config=config)
            self.num_tokens = 0
            for index, layer in enumerate(self.layers):
                if isinstance(layer, DynamicSlidingWindowLayer):
                    is_hybrid = isinstance(layer, LinearAttentionCacheLayerMixin)
                    self.layers[index] = LinearAttentionAndFullAttentionLayer() if is_hybrid else DynamicLayer()

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.num_tokens

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return self.num_tokens

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return self.num_tokens + query_length, 0

    return RecurrentCache


Exchange = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From a block's number and its new keys and values [R, G, T, D] to all of them [R, G, P + T, D]."""


def new_exchange_cache(num_past: int | Callable[[int], int], exchange: Exchange) -> Cache:
    """A cache whose content is kept elsewhere: ``exchange`` stores and fetches it.

    ``num_past``: the columns of each row; or what says so when it is asked on behalf of a block.
    """
    return _exchange_cache_class()(num_past if callable(num_past) else lambda layer: num_past, exchange)


@functools.cache
def _exchange_cache_class() -> Any:
    from transformers import Cache

    class ExchangeCache(Cache):
        """Relies on models asking a cache for lengths and mask sizes, and calling ``update`` once in each block."""

        def __init__(self, num_past: Callable[[int], int], exchange: Exchange) -> None:
            super().__init__(layers=[])
            self._num_past = num_past
            self._exchange = exchange

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self._num_past(layer_idx)

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return self._num_past(layer_idx)

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return self._num_past(layer_idx) + query_length, 0

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return self._exchange(layer_idx, key_states, value_states)

        def __bool__(self) -> bool:
            return True  # or models would take it for none, because it has no layers

    return ExchangeCache


def note_tokens(cache: Cache, num_tokens: int) -> None:
    """Tell a cache that the model has added tokens to it."""
    if hasattr(cache, "num_tokens"):
        cache.num_tokens += num_tokens


def crop_cache(cache: Cache, num_tokens: int) -> None:
    """Forget all but the first ``num_tokens`` tokens. Recurrent states stay as they are: those are for ``put_states``.

    ``crop`` took the length to keep, and takes the negative number of tokens to remove; the latter works everywhere.
    ``reset`` is no way to keep none: in 5.17 it zeroes what is cached instead of forgetting it.
    """
    from transformers.cache_utils import DynamicLayer

    num_cached = int(cache.get_seq_length())
    if not 0 <= num_tokens <= num_cached:
        raise InvalidRequestError(f"{num_tokens} tokens can't be kept of a cache that has {num_cached}")
    if num_tokens < num_cached:
        if not hasattr(cache, "num_tokens"):
            cache.crop(num_tokens - num_cached)
            return
        for layer in cache.layers:
            if isinstance(layer, DynamicLayer):
                DynamicLayer.crop(layer, num_tokens - num_cached)
        cache.num_tokens = num_tokens


_STATES: Final = ("conv_states", "recurrent_states")
"""Attributes of a cache's layer that hold a state of fixed size [R, ...]: a tensor, or a dict of several."""


def _state_slots(cache: Cache) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Where the states of fixed size are: (dict, key)."""
    for layer in cache.layers:
        for name in _STATES:
            value = getattr(layer, name, None)
            if isinstance(value, dict):
                yield from ((value, key) for key in value)
            elif value is not None:
                yield vars(layer), name


def copy_states(cache: Cache, rows: torch.Tensor | None = None) -> list[torch.Tensor | None]:
    """Copies of all states of fixed size, of ``rows`` or of all; None where there is none yet, which means zeros."""
    copies: list[torch.Tensor | None] = []
    for owner, key in _state_slots(cache):
        state: torch.Tensor | None = owner[key]
        copies.append(None if state is None else state.clone() if rows is None else state.index_select(0, rows))
    return copies


def put_states(cache: Cache, copies: list[torch.Tensor | None], rows: torch.Tensor | None = None) -> None:
    """Put back what :func:`copy_states` gave. Zeros are how every recurrence begins."""
    slots = list(_state_slots(cache))
    padded = [*copies, *[None] * (len(slots) - len(copies))]
    for (owner, key), copied in zip(slots, padded, strict=True):
        state: torch.Tensor | None = owner[key]
        if state is None:
            continue
        if rows is None:
            state.copy_(torch.zeros((), dtype=state.dtype, device=state.device) if copied is None else copied)
        elif copied is None:
            state.index_fill_(0, rows, 0)
        else:
            state.index_copy_(0, rows, copied)


def cache_shapes(cache: Cache) -> list[tuple[int, int, int]]:
    """For each layer of a cache that holds keys and values the number of heads and the widths of both."""
    layers: list[Any] = list(cache.layers)
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]


def cache_bytes(cache: Cache) -> tuple[int, int]:
    """Memory of a cache's keys and values, and of its states of fixed size."""
    keys = sum(
        int(tensor.nbytes)
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )
    states = [owner[key] for owner, key in _state_slots(cache)]
    return keys, sum(int(state.nbytes) for state in states if state is not None)
