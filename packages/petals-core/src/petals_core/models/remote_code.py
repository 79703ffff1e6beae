"""Families whose code comes with the checkpoint. It can do anything: whoever runs it must have said so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from petals_core.models.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MODEL_KINDS: Final = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")


def load_remote_code(source: Source) -> PreTrainedConfig:
    """Run a checkpoint's code, make its classes known to Transformers under its config's class, and return the config.

    Raises:
        CheckpointError: the code can't be downloaded.
        Exception: whatever the code raises.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    for file in source.code_files():
        source.path(file)
    folder = str(source.path("config.json").parent)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    names: dict[str, Any] = getattr(config, "auto_map", None) or {}
    for kind in _MODEL_KINDS:
        if isinstance(name := names.get(kind), str):
            model_class = get_class_from_dynamic_module(name, folder)
            getattr(transformers, kind).register(type(config), model_class, exist_ok=True)
    return config
