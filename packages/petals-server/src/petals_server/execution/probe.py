"""How a span's sessions can be batched, found out by running it: what each block keeps and sees of a token.

The span runs with an attention function and a mask function of our own that note what they are called with; then a
packed batch is compared with its rows alone. What fails on the way is batched in another form, so an architecture that
does something unheard of is slower and not wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch

from petals_core.models import transformers_attention as interface
from petals_core.models.span import Span
from petals_core.models.transformers_caches import new_exchange_cache
from petals_server.cache.tensors import LayerKind

log = logging.getLogger(__name__)

_HANDLED: Final = frozenset({"scaling", "softcap", "s_aux", "sliding_window", "dropout", "is_causal"})
"""Arguments of an attention function that packed attention knows, or can leave alone because masks say the same."""
_HARMLESS: Final = frozenset(
    {"position_ids", "position_embeddings", "use_cache", "cache_position", "past_key_values", "return_dict"}
)


class Form(Enum):
    """How sessions' tokens go through a span together."""

    PACKED = "packed"
    """All tokens in one row, attention by a function of ours."""
    PADDED = "padded"
    """Rows padded to one length, attention by the model's own."""
    ALONE = "alone"
    """Not at all: blocks with recurrent states, or that count positions by the columns of a cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What was found out."""

    form: Form
    kinds: tuple[LayerKind, ...]
    """Of all blocks of the span; none where sessions keep their caches for themselves."""


@dataclass(frozen=True, slots=True)
class _Mask:
    """Stands for a mask on its way to a block's attention."""

    window: int | None
    is_chunked: bool


def find_layout(span: Span) -> Layout:
    """Find out how a span's sessions can be batched."""
    if span.is_recurrent:
        return Layout(form=Form.ALONE, kinds=())
    if span.architecture.has_attention_interface:
        kinds = _watch_attention(span)
        if _asks_for_length(span):
            return Layout(form=Form.ALONE, kinds=())
        if kinds is not None:
            return Layout(form=Form.PACKED, kinds=kinds)
    return Layout(form=Form.PADDED, kinds=_watch_cache(span))


@torch.inference_mode()
def _watch_attention(span: Span) -> tuple[LayerKind, ...] | None:
    """The kinds of blocks as their attention is called; None if something is not as packed attention needs it."""
    seen: dict[int, LayerKind] = {}
    surprises: list[str] = []

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        known = _HANDLED | _HARMLESS
        surprises.extend(name for name, given in kwargs.items() if given is not None and name not in known)
        if not isinstance(mask, _Mask):
            surprises.append(f"a mask of type {type(mask).__name__}")
        elif module.layer_idx in seen:
            surprises.append("a block that attends twice")
        else:
            seen[module.layer_idx] = LayerKind(
                num_heads=key.shape[1],
                key_size=key.shape[3],
                value_size=value.shape[3],
                window=mask.window,
                is_chunked=mask.is_chunked,
            )
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    try:
        name = f"petals_probe_{id(span)}"
        with interface.registered(name, attend, _describe_mask):
            span.forward_packed(_zeros(span, 2), torch.arange(2, device=span.device)[None], attention=name)
    except Exception as error:
        surprises.append(f"{type(error).__name__}: {error}")
    if not surprises and sorted(seen) != list(range(span.num_blocks)):
        surprises.append("blocks that do not attend")
    if surprises:
        log.info("sessions are batched with pads: %s has %s", span.config.model_type, surprises[0])
        return None
    return tuple(seen[index] for index in range(span.num_blocks))


def _describe_mask(*args: object, **kwargs: Any) -> _Mask:
    """In the place of a function that makes masks: what its mask would say."""
    window = kwargs.get("local_size")
    if window is None:
        return _Mask(None, is_chunked=False)
    # The token that is ``window`` behind the first sees the second where windows slide, and not where a chunk ended.
    at = [torch.tensor(each) for each in (0, 0, window, 1)]
    return _Mask(int(window), is_chunked=not bool(kwargs["mask_function"](*at)))


@torch.inference_mode()
def _asks_for_length(span: Span) -> bool:
    """Whether blocks themselves ask a cache how many columns it has (llama4 scales queries by it)."""
    is_inside = False
    has_asked = False

    def tell(layer: int) -> int:
        nonlocal has_asked
        has_asked |= is_inside
        return 0

    def enter(*args: object) -> None:
        nonlocal is_inside
        is_inside = True

    def leave(*args: object) -> None:
        nonlocal is_inside
        is_inside = False

    with ExitStack() as stack:
        for block in span.blocks:
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        span(_zeros(span, 2), cache=new_exchange_cache(tell, lambda layer, keys, values: (keys, values)))
    return has_asked


@torch.inference_mode()
def _watch_cache(span: Span) -> tuple[LayerKind, ...]:
    """The kinds of blocks by what they put into a cache; masks do the windows, so everything is kept."""
    return tuple(
        LayerKind(num_heads=heads, key_size=key_size, value_size=value_size, window=None)
        for heads, key_size, value_size in span.measure_cache_shapes()
    )


def _zeros(span: Span, num_tokens: int) -> torch.Tensor:
    return torch.zeros(1, num_tokens, span.hidden_size, dtype=span.dtype, device=span.device)


def token_elements(kinds: Sequence[LayerKind]) -> int:
    """Elements that the cache keeps of a token in all blocks."""
    return sum(kind.token_elements for kind in kinds)
