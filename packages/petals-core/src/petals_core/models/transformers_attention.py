"""Attention functions of our own in the place of a model's.

Relies on ``AttentionInterface`` and ``AttentionMaskInterface``: a model takes the function that the name in its config
stands for at each call, and makes no mask where a name has a function but no mask
function. Read against 5.17 and 5.23 (``modeling_utils.py``, ``masking_utils.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from petals_core.models import transformers_private as private

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def register(name: str, attention: Callable[..., Any]) -> None:
    """Make an attention function known under a name, for good. It gets no masks."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, attention)


@contextmanager
def registered(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Make functions for attention and masks known under a name for a while."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    try:
        yield
    finally:
        private.forget_attention(name)


@contextmanager
def used(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model's blocks attend by the function of that name. Not for use in several threads at once."""
    config = model.config
    before = private.attention_name(config)
    private.set_attention_name(config, name)
    try:
        yield
    finally:
        private.set_attention_name(config, before)
