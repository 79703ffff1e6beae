"""Which class of Transformers a config makes, where that class keeps its blocks, and what can't be split.

Each function says what it relies on. Read against Transformers 5.17 and 5.23.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from petals_core.errors import UnsupportedModelError, first_line
from petals_core.models import transformers_caches as caches
from petals_core.models.transformers_private import is_stateful

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CONTINUED_BY_TOKENS: Final[dict[str, str]] = {
    "jamba": "its scan over several tokens begins with an empty state, whatever the cache holds",
}
"""Families that go on from a cache by single tokens only, and why. The first tokens of a cache go in together."""


def base_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that AutoModel would make.

    ``MODEL_MAPPING`` is exported but documented only through ``AutoModel.register``.
    """
    from transformers import MODEL_MAPPING

    try:
        classes: Any = MODEL_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedModelError(
            f"{config.model_type} has no base model in this version of Transformers: choose another model"
        ) from None
    return classes[0] if isinstance(classes, (list, tuple)) else classes


def check_config(config: PreTrainedConfig, base_class: type[PreTrainedModel]) -> None:
    """Refuse what can't be split: encoders beside the decoder, state that is not in a ``Cache`` of known layers."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder and can't be split: choose a decoder-only model")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModelError(
            f"{name} has parts besides one text decoder and can't be split: choose a text model"
        )
    if "past_key_values" not in inspect.signature(base_class.forward).parameters:
        raise UnsupportedModelError(
            f"{name} keeps its state in a cache of its own kind and can't be served in sessions: choose another model"
        )
    caches.check_layer_types(config, is_stateful=is_stateful(base_class))


def build_on_meta(base_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model without memory for its weights."""
    try:
        with torch.device("meta"):
            return base_class(config)
    except Exception as error:  # constructors raise whatever comes of a config that they did not expect
        raise UnsupportedModelError(
            f"{config.model_type} can't be built from this config ({first_line(error)}): compare it with the original"
        ) from error


def find_block_path(model: nn.Module, num_blocks: int, name: str) -> str:
    """Where the list of blocks is inside a base model: ``layers``, ``h``, ``decoder.layers``, ...

    Relies on every decoder keeping its blocks in one ``ModuleList`` of ``num_hidden_layers`` modules.
    """
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_blocks
        and not any(part.isdecimal() for part in path.split("."))
    ]
    if len(paths) > 1:  # lists beside the blocks, such as one projection per block: the blocks have the most modules
        sizes = {path: sum(1 for _ in model.get_submodule(path).modules()) for path in paths}
        paths.sort(key=lambda path: -sizes[path])
        if sizes[paths[0]] == sizes[paths[1]]:
            paths = []
    if not paths:
        raise UnsupportedModelError(f"{name} can't be split: it has no single list of {num_blocks} decoder blocks")
    return paths[0]


def mend_base_model(model: PreTrainedModel, base_class: type[PreTrainedModel]) -> None:
    """Make ``model.base_model`` the base model where the class's ``base_model_prefix`` names no attribute (llama4)."""
    if not isinstance(model.base_model, base_class):
        for name, child in model.named_children():
            if isinstance(child, base_class):
                model.base_model_prefix = name


@functools.lru_cache(maxsize=64)
def takes_position_ids(forward: Callable[..., Any]) -> bool:
    """Whether a base model's blocks see positions at all. bloom and mpt have none: only distances count there."""
    return "position_ids" in inspect.signature(forward).parameters
