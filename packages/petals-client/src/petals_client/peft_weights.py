"""An adapter in PEFT's format, at the client: to train it further, to load what lies outside of the blocks, to save."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from petals_client.lora import LoraSettings, TunedAdapter
from petals_core.errors import ConfigurationError
from petals_core.models.adapter_files import AdapterFiles, save_adapter
from petals_core.models.architecture import Architecture

_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftWeights:
    """A stored adapter; nothing but its settings and names is read yet."""

    files: AdapterFiles

    @property
    def base_model(self) -> str | None:
        """The model that it was trained for, as PEFT noted it."""
        name = self.files.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def settings(self) -> LoraSettings:
        """Those by which the same matrices are made anew.

        Raises:
            ConfigurationError: its layers differ in rank or scaling, which is not trained here.
        """
        config = self.files.config
        if config.get("rank_pattern") or config.get("alpha_pattern"):
            raise ConfigurationError(
                f"adapter {self.files.source} has layers of several ranks or scalings: it can be used with "
                "active_adapter, but not trained further here"
            )
        targets = config.get("target_modules")
        return LoraSettings(
            rank=config["r"],
            alpha=config["lora_alpha"],
            target_modules=targets if isinstance(targets, str) else tuple(map(str, targets or ())),
            is_rank_stabilized=self.files.settings.is_rank_stabilized,
        )

    def load_into(self, model: nn.Module, adapter: TunedAdapter | None, architecture: Architecture) -> None:
        """Copy what it has of the blocks into ``adapter``, if there is one, and the rest into the model's parameters.

        Raises:
            CheckpointError: its file is broken.
            ConfigurationError: it does not fit the model.
        """
        if adapter is not None:
            stored = self.files.load(
                block_path=architecture.block_path,
                start=0,
                shapes=architecture.block_layers,
                model_type=str(model.config.model_type),  # type: ignore[union-attr]
                dtype=next(adapter.parameters()).dtype,
            )
            for index, path, own in adapter.layers():
                matrices = stored.blocks.get(index, {}).get(path)
                if matrices is None or matrices.down_KI.shape != own.lora_A.shape:
                    raise ConfigurationError(
                        f"adapter {self.files.source} has no matrices of rank {adapter.rank} for {path} of "
                        f"block {index}"
                    )
                own.lora_A.data.copy_(matrices.down_KI)
                own.lora_B.data.copy_(matrices.up_OK)
        parameters = dict(nn.Module.named_parameters(model))
        for name in self.files.outside(architecture.block_path):
            parameter = parameters.get(name)
            if parameter is None or tuple(parameter.shape) != self.files.entries[name].shape:
                raise ConfigurationError(
                    f"adapter {self.files.source} has {name}, which is no weight of this model: load the model with "
                    "the class that it was trained with, or adapt the client's own layers with PEFT"
                )
            parameter.data.copy_(self.files.read(name))


def save_peft(
    folder: str | os.PathLike[str],
    model: nn.Module,
    adapter: TunedAdapter,
    others: dict[str, Tensor],
    *,
    block_path: str,
    base_model: str,
) -> None:
    """Write an adapter, and ``others`` that train beside it, so that PEFT and servers can load them."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    path = f"{prefix}.{block_path}" if prefix and hasattr(model, prefix) else block_path
    layout = adapter.layout
    kind = next((task for suffix, task in _TASKS.items() if type(model).__name__.endswith(suffix)), None)
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": _is_transposed(model),
        "inference_mode": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in others}) or None,
        "peft_type": "LORA",
        "r": layout.rank,
        "target_modules": list(adapter.target_modules),
        "task_type": kind,
        "use_rslora": not math.isclose(layout.scaling, adapter.alpha / layout.rank),
    }
    save_adapter(folder, config, {**adapter.peft_tensors(path), **others})


def _is_transposed(model: nn.Module) -> bool:
    """Whether the family's linear layers are gpt2's, which PEFT has to be told."""
    return getattr(getattr(model, "config", None), "model_type", None) == "gpt2"
