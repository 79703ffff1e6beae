"""The configs of a checkpoint, as Transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from petals_core.errors import CheckpointError, UnsupportedModelError
from petals_core.models.remote_code import load_remote_code
from petals_core.models.sources import Source, one_line, read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig


def read_config(path: Path, source: Source, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The config at ``path``. Code of a checkpoint's own is run only for families that Transformers does not know.

    Raises:
        CheckpointError: it is broken.
        UnsupportedModelError: Transformers does not know the family, and its code is missing or not trusted.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} names no model_type: it is not the config of a Transformers model")
    is_known = model_type in CONFIG_MAPPING
    has_code = isinstance(raw.get("auto_map"), dict)
    if not is_known and has_code and not trust_remote_code:
        raise UnsupportedModelError(
            f"{source} comes with code of its own ({model_type}), which can do anything where it runs: if you trust "
            "it, say so with --trust-remote-code (trust_remote_code=True in a client)"
        )
    try:
        if not is_known and has_code:
            return load_remote_code(source)
        config = AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        if not is_known and not has_code:
            raise UnsupportedModelError(
                f"{source} is of type {model_type}, which this version of Transformers does not know: "
                "upgrade transformers or choose another model"
            ) from None
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the config of {source} can't be read: {one_line(error)}") from None
    return config


def read_generation_config(source: Source) -> GenerationConfig | None:
    """What the checkpoint says of how to generate with it; None: nothing.

    Raises:
        CheckpointError: it is broken.
    """
    from transformers import GenerationConfig

    path = source.find("generation_config.json")
    if path is None:
        return None
    try:
        return GenerationConfig.from_pretrained(str(path.parent), local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} can't be read: {one_line(error)}") from None
