"""A base model of Transformers cut down to a span of its blocks, which alone change hidden states.

Each function says what it relies on. Read against Transformers 5.17 and 5.23.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from petals_core.errors import UnsupportedModelError
from petals_core.models.transformers_quantization import shared_modules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Passthrough(nn.Module):
    """Stands where something touched hidden states on their way into or out of the blocks: returns them as they are."""

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden


class NoPositions(nn.Module):
    """Stands for a table of learned positions, which the client has added already: adds nothing.

    Relies on the result being added to the hidden states and nothing else (gpt2, opt).
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros((), dtype=dtype), persistent=False)

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        # Made anew: the buffer is on the meta device while the model is built, and what comes of it is not ours to say.
        zero: torch.Tensor = self.get_buffer("zero")
        return torch.zeros((), dtype=zero.dtype, device=zero.device)


def neutralize(model: PreTrainedModel, block_path: str) -> None:
    """Turn everything with weights outside the blocks into a module that leaves hidden states alone.

    Relies on: token embeddings are not called when ``inputs_embeds`` are given; other embeddings are tables of
    positions whose rows are added to the hidden states; norms and projections map hidden states to hidden states.
    """
    tokens = model.get_input_embeddings()
    owner: nn.Module = model
    *outer, last = block_path.split(".")
    for step in [*outer, last]:
        for name, module in list(owner.named_children()):
            if name == step or not any(True for _ in module.parameters()):
                continue
            setattr(owner, name, _stand_in(model, name, module, tokens))
        if any(True for _ in owner.parameters(recurse=False)):
            raise UnsupportedModelError(f"{model.config.model_type} can't be split: it has weights beside its blocks")
        owner = owner.get_submodule(step)


def _stand_in(model: PreTrainedModel, name: str, module: nn.Module, tokens: nn.Module) -> nn.Module:
    if module is tokens:
        return Passthrough()
    if isinstance(module, nn.Embedding):
        if "pos" in name or name == "wpe":
            return NoPositions(module.weight.dtype)
    elif isinstance(module, nn.Linear) or "norm" in type(module).__name__.lower():
        return Passthrough()
    raise UnsupportedModelError(
        f"{model.config.model_type} can't be split: nothing is known about its part {name} ({type(module).__name__})"
    )


def cut(model: PreTrainedModel, block_path: str, multipliers: Iterable[str], start: int, end: int) -> None:
    """Leave blocks ``start`` up to ``end``, numbered from 0, and nothing else that changes hidden states.

    The blocks are cut from the full list, so that what depends on a block's index in its constructor holds. Relies on
    blocks finding their place in the cache by ``layer_idx``, and on the model reading ``num_hidden_layers`` and its
    per-layer lists from the one config object that all modules share.
    """
    neutralize(model, block_path)
    for path in multipliers:
        set_multiplier(model, path)
    _keep_blocks(model, block_path, start, end)


def set_multiplier(model: nn.Module, path: str) -> None:
    """Make an attribute by which a model multiplies hidden states multiply by 1."""
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, 1.0)


def narrow(model: PreTrainedModel, block_path: str, start: int, end: int) -> PreTrainedModel:
    """A copy of a cut model with only its blocks ``start`` up to ``end``, which shares all tensors with it.

    Modules and the config are copied because a block knows its place in the cache, and the model its per-layer lists.
    """
    shared: list[object] = [*model.parameters(), *model.buffers()]
    shared += shared_modules(model)
    memo: dict[int, object] = {id(each): each for each in shared}
    left_out = nn.Module()
    for index, block in enumerate(model.get_submodule(block_path).children()):
        if not start <= index < end:
            memo[id(block)] = left_out
    model = copy.deepcopy(model, memo)
    _keep_blocks(model, block_path, start, end)
    return model


def _keep_blocks(model: PreTrainedModel, block_path: str, start: int, end: int) -> None:
    """Drop the other blocks, number those left from 0, and make the config theirs."""
    parent_path, _, attribute = block_path.rpartition(".")
    parent = model.get_submodule(parent_path)
    blocks = list(getattr(parent, attribute))
    num_blocks = len(blocks)
    for index, block in enumerate(blocks[start:end]):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    setattr(parent, attribute, nn.ModuleList(blocks[start:end]))
    slice_config(model.config, num_blocks, start, end)


def slice_config(config: PreTrainedConfig, num_blocks: int, start: int, end: int) -> None:
    """Make a config's per-layer lists (``layer_types``, ``no_rope_layers``, ...) those of the span, in place.

    Some families compute such a list from the number of a block (jamba: attention in every eighth). Their config gets a
    class of its own, whose list is a value.
    """
    config_class = type(config)
    own = {name: value for name, value in vars(config).items() if "layer" in name}
    computed = {
        name: getattr(config, name)
        for name in dir(config_class)
        if "layer" in name and isinstance(inspect.getattr_static(config_class, name), (property, list))
    }
    for name, value in own.items():
        if isinstance(value, (list, tuple)) and len(value) == num_blocks:
            setattr(config, name, value[start:end])
    lists = {
        name: list(value)[start:end]
        for name, value in computed.items()
        if isinstance(value, (list, tuple)) and len(value) == num_blocks and name not in own
    }
    if lists:
        body = {**lists, "__module__": config_class.__module__, "__qualname__": config_class.__qualname__}
        config.__class__ = type(config_class.__name__, (config_class,), body)
    config.num_hidden_layers = end - start
