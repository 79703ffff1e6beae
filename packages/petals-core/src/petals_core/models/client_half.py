"""The client's part of a model: embeddings, final norm and head around a module that stands for all blocks.

It is the whole model of Transformers with its list of blocks replaced, so ``generate`` and all else work as they do
there.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from petals_core.models import transformers_loading as loading
from petals_core.models import transformers_quantization as quantizers
from petals_core.models import transformers_structure as structure
from petals_core.models.architecture import Architecture, find_architecture, tensor_names
from petals_core.models.checkpoint import Checkpoint, resolve_dtype
from petals_core.models.devices import check_device
from petals_core.models.memory import release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_log: Final = logging.getLogger(__name__)


def load_client_half(
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    *,
    blocks: nn.Module,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a model of ``model_class`` whose blocks are ``blocks``: its embeddings, final norm and head, and no more.

    ``blocks`` is put where the base model has its ``ModuleList``, and the tables of positions beside it, which only
    blocks look into, are None: they would cost each step a few operations. The models of Transformers do the following
    with ``blocks``, so it must allow it:

    - ``blocks[: config.num_hidden_layers]`` and ``iter(blocks)``, ``enumerate(blocks)``: yield itself, once.
    - ``len(blocks)``: the true number of blocks, which ``config.num_hidden_layers`` also stays.
    - ``blocks(hidden, attention_mask=..., past_key_values=..., position_ids=..., position_embeddings=..., ...)``, as
      the family's block is called (also positionally): returns hidden states of the same shape, in a tuple whose
      element 0 they are where ``find_architecture(config).blocks_return_tuples``.
    - attributes of a block that some families read: ``attention_type``.

    Weights of the head that the checkpoint lacks (``score`` of a classifier) are initialised as Transformers does, and
    a warning is logged. ``config`` overrides the checkpoint's own (labels of a classifier, say); it is not changed.

    Raises:
        Errors as in :func:`petals_core.models.span.load_span`.
    """
    dtype = resolve_dtype(dtype, checkpoint)
    device = check_device(device, dtype)
    config = checkpoint.config if config is None else config
    architecture = find_architecture(config)
    names = tensor_names(checkpoint, architecture)
    if quantizers.stored_quantization(config) is not None:
        config = quantizers.client_config(config, {checkpoint.entry(name).dtype for name in names.outside})
    tensors = checkpoint.lazy({name: name for name in names.outside})

    def remove_blocks(model: PreTrainedModel) -> None:
        structure.mend_base_model(model, architecture.base_class)
        _set_blocks(model, architecture, nn.ModuleList())
        loading.drop_tied_twins(model, checkpoint, tensors)

    model, fresh = loading.load(
        loading.make_subclass(model_class, remove_blocks),
        checkpoint,
        config,
        tensors,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        is_head_optional=True,
    )
    model.__class__ = model_class
    model.config.name_or_path = checkpoint.name
    # After the loading, so that weights which the blocks bring along are not taken for the checkpoint's.
    _set_blocks(model, architecture, blocks)
    parent = model.base_model.get_submodule(architecture.block_path.rpartition(".")[0])
    for name, module in parent.named_children():
        if type(module).__name__.endswith("RotaryEmbedding"):
            setattr(parent, name, _NoTables())
    if fresh:
        _log.warning("%s has no %s: initialised anew, to be trained", checkpoint.name, ", ".join(sorted(fresh)))
    release_memory()
    return model


class _NoTables(nn.Module):
    """In the place of rotary embeddings where no blocks are."""

    def forward(self, *args: object, **kwargs: object) -> None:
        """Nothing."""


def _set_blocks(model: PreTrainedModel, architecture: Architecture, blocks: nn.Module) -> None:
    parent_path, _, attribute = architecture.block_path.rpartition(".")
    setattr(model.base_model.get_submodule(parent_path), attribute, blocks)
