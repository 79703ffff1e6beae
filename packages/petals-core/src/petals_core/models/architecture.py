"""How a model of Transformers is put together, learned from its config: its list of blocks, and what is around it.

Nothing is loaded or downloaded for it. A checkpoint's tensors are told apart by it as well: those of each block, and
those outside.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import nn

from petals_core.errors import CheckpointError
from petals_core.models import transformers_caches as caches
from petals_core.models import transformers_cutting as cutting
from petals_core.models import transformers_quantization as quantizers
from petals_core.models import transformers_structure as structure
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.low_rank import LayerShapes, linear_layers
from petals_core.models.transformers_private import takes_attention_functions
from petals_core.models.transformers_surroundings import find_surroundings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a family of models is put together."""

    base_class: type[PreTrainedModel]
    block_class: type[nn.Module]
    block_path: str
    """Where the base model keeps its blocks: ``layers``, ``h``, ``decoder.layers``."""
    num_blocks: int
    hidden_size: int
    block_parameters: tuple[int, ...]
    """Number of elements in each block's weights, which tells its size before anything is downloaded."""
    block_linear_parameters: tuple[int, ...]
    """How many of these are in linear layers, which can be quantized."""
    blocks_return_tuples: bool
    """Whether the base model takes element 0 of what a block returns (bloom, falcon, mpt, bamba) or all of it."""
    multipliers: tuple[str, ...]
    """Attributes of the base model by which it multiplies hidden states before the first block (granite)."""
    is_recurrent: bool
    """Whether some blocks keep a state of fixed size, which can't be cut back to fewer tokens."""
    block_layers: tuple[LayerShapes, ...]
    """Each block's linear layers, which adapters may change."""
    has_attention_interface: bool
    """Whether attention goes through Transformers' ``AttentionInterface`` and can be replaced."""


def block_count(config: PreTrainedConfig) -> int:
    """Number of decoder blocks."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """Learn from a config how the model is built, without loading anything. Remembered for each config.

    Raises:
        UnsupportedModelError: the model can't be split.
    """
    key = (type(config), config.to_json_string(use_diff=False))
    architecture = _known_architectures.get(key)
    if architecture is None:
        architecture = _known_architectures[key] = _find_architecture(config)
    return architecture


_known_architectures: Final[dict[tuple[type, str], Architecture]] = {}
"""Building a model of a hundred blocks takes about half a second even without weights."""


def _find_architecture(config: PreTrainedConfig) -> Architecture:
    base_class = structure.base_class_of(config)
    structure.check_config(config, base_class)
    num_blocks = block_count(config)
    is_recurrent = caches.is_recurrent(config)
    # The constructors write into their config, and a model is built in the dtype that its config names.
    config = copy.deepcopy(config)
    model = structure.build_on_meta(base_class, config)
    block_path = structure.find_block_path(model, num_blocks, config.model_type)
    blocks = model.get_submodule(block_path)
    assert isinstance(blocks, nn.ModuleList)
    block_class = type(blocks[0])
    block_parameters = tuple(sum(weight.numel() for weight in block.parameters()) for block in blocks)
    block_linear_parameters = tuple(quantizers.count_linear_parameters(block) for block in blocks)
    block_layers = tuple(linear_layers(block) for block in blocks)
    cutting.neutralize(model, block_path)
    surroundings = find_surroundings(model, block_path, int(config.hidden_size))
    return Architecture(
        base_class=base_class,
        block_class=block_class,
        block_path=block_path,
        num_blocks=num_blocks,
        hidden_size=int(config.hidden_size),
        block_parameters=block_parameters,
        block_linear_parameters=block_linear_parameters,
        blocks_return_tuples=surroundings.blocks_return_tuples,
        multipliers=surroundings.multipliers,
        is_recurrent=is_recurrent,
        block_layers=block_layers,
        has_attention_interface=takes_attention_functions(base_class),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """A checkpoint's tensors, told apart by what holds them."""

    outside: tuple[str, ...]
    """Embeddings, final norm, head."""
    by_block: tuple[tuple[str, ...], ...]
    _number_at: dict[str, tuple[int, int]]

    def renumbered(self, name: str, index: int) -> str:
        """A block's tensor under the name that it would have in block ``index``."""
        start, end = self._number_at[name]
        return f"{name[:start]}{index}{name[end:]}"


def tensor_names(checkpoint: Checkpoint, architecture: Architecture) -> TensorNames:
    """Tell a checkpoint's tensors apart.

    Raises:
        CheckpointError: the checkpoint has more or fewer blocks than its config says.
    """
    pattern = re.compile(rf"(?:^|\.){re.escape(architecture.block_path)}\.(\d+)\.")
    outside: list[str] = []
    by_block: list[list[str]] = [[] for _ in range(architecture.num_blocks)]
    number_at: dict[str, tuple[int, int]] = {}
    for name in checkpoint.tensor_names:
        match = pattern.search(name)
        if match is None:
            outside.append(name)
            continue
        index = int(match[1])
        if index >= architecture.num_blocks:
            continue  # beside the decoder: layers for multi-token prediction come under the next numbers
        by_block[index].append(name)
        number_at[name] = match.span(1)
    empty = [index for index, names in enumerate(by_block) if not names]
    if empty:
        raise CheckpointError(
            f"{checkpoint.name} has no tensors for block {empty[0]} although its config says "
            f"{architecture.num_blocks} blocks: copy or download the checkpoint again"
        )
    return TensorNames(outside=tuple(outside), by_block=tuple(map(tuple, by_block)), _number_at=number_at)
