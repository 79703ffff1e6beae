"""LoRA adapters as PEFT stores them: a folder or repository with ``adapter_config.json`` and safetensors.

Only what changes linear layers of the blocks is for servers. Weights outside of them (a classifier's head, say) belong
to clients. Whatever else PEFT can do to a model is refused by name, so that no adapter is half applied.

Source: the checkpoint format's description, https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from petals_core.adapter_names import name_adapter
from petals_core.errors import CheckpointError, ConfigurationError
from petals_core.limits import MAX_ADAPTER_RANK
from petals_core.models.low_rank import Adapter, LayerShapes, LowRank
from petals_core.models.safetensors_file import TensorEntry, read_header, read_tensor
from petals_core.models.sources import Source, open_source, read_json

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PICKLED: Final = "adapter_model.bin"
_PREFIX: Final = "base_model.model."
_MATRIX: Final = re.compile(r"(.+)\.lora_(A|B)\.weight")
_REFUSED: Final = {
    "alora_invocation_tokens": "an adapter that begins at certain tokens",
    "arrow_config": "routing between adapters",
    "kasa_config": "KaSA",
    "layer_replication": "repeated blocks",
    "lora_bias": "biases",
    "megatron_config": "Megatron's layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "parameters that are no linear layers, such as fused experts",
    "use_bdlora": "block-diagonal matrices",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
"""Settings of PEFT that change what is computed, and are not computed here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What the matrices alone do not tell."""

    alpha: float
    alpha_pattern: Mapping[str, float]
    is_rank_stabilized: bool
    """Scaling by the root of the rank ("A Rank Stabilization Scaling Factor ...", Kalajdzievski 2023)."""

    def scaling(self, path: str, rank: int) -> float:
        """The factor of the module at ``path`` in the model."""
        alpha = self.alpha
        for pattern, own in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", path):  # as PEFT reads such patterns
                alpha = own
                break
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)


class AdapterFiles:
    """An adapter where it is stored: settings and the names of its tensors; these are read when they are asked for."""

    def __init__(self, source: Source, name: str) -> None:
        config_path = source.find(CONFIG)
        if config_path is None:
            raise CheckpointError(f"{source} has no {CONFIG}: it is not an adapter that PEFT saved")
        if not source.has(WEIGHTS):
            if source.has(_PICKLED):
                raise CheckpointError(
                    f"{source} has its weights pickled, which is not safe to load: save the adapter with a newer PEFT"
                )
            raise CheckpointError(f"{source} has no {WEIGHTS}: it is not an adapter that PEFT saved")
        self.source = source
        self.config = read_json(config_path)
        self.settings = _read_settings(self.config, source)
        self._path = source.path(WEIGHTS)
        self.entries: Mapping[str, TensorEntry] = read_header(self._path, WEIGHTS)
        """The tensors by their names in the model, without PEFT's prefix."""
        self.entries = {entry_name.removeprefix(_PREFIX): entry for entry_name, entry in self.entries.items()}
        self.name = name_adapter(name, self._digest(), where=str(source))
        """The name by which clients choose it: what it is called, and a hash of what it is."""

    @classmethod
    def open(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        name: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> AdapterFiles:
        """Find an adapter in a folder or on the hub; of its weights no more than their names is read.

        ``name`` is what to call it; by default the folder's name, or the hub's.

        Raises:
            CheckpointError: there is none, or it can't be read.
            ConfigurationError: it is of a kind that can't be used here, or its name can't.
        """
        source = open_source(name_or_path, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        return cls(source, source.name if name is None else name)

    def _digest(self) -> str:
        """Eight hex digits that tell adapters of one name apart."""
        settings = {key: self.config.get(key) for key in ("lora_alpha", "alpha_pattern", "use_rslora")}
        content = [settings, self.source.sha256((WEIGHTS,), None)[WEIGHTS]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def outside(self, block_path: str) -> tuple[str, ...]:
        """Names of the tensors that belong to no block."""
        pattern = _block_pattern(block_path)
        return tuple(name for name in self.entries if pattern.search(name) is None)

    def read(self, name: str) -> Tensor:
        """One tensor, by its name in the model."""
        return read_tensor(self._path, self.entries[name])

    def load(
        self,
        *,
        block_path: str,
        start: int,
        shapes: Sequence[LayerShapes],
        model_type: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_rank: int = MAX_ADAPTER_RANK,
    ) -> Adapter:
        """Read the matrices of the blocks from ``start`` on, whose linear layers ``shapes`` tells, and no others.

        Raises:
            CheckpointError: the file is broken.
            ConfigurationError: the adapter is for another model, changes what can't be changed, or is too large.
        """
        pattern = _block_pattern(block_path)
        blocks: dict[int, dict[str, LowRank]] = {}
        for name in self.entries:
            place = pattern.search(name)
            if place is None:
                continue
            index = int(place[1])
            if not start <= index < start + len(shapes):
                continue
            match = _MATRIX.fullmatch(name)
            if match is None:
                raise self._misfit(f"its {name} is no matrix of a linear layer")
            if match[2] == "B":
                continue
            path = self._find_layer(match[1][place.end() :], shapes[index - start], model_type, name)
            blocks.setdefault(index, {})[path] = self._read_layer(
                match[1], shapes[index - start][path], device=device, dtype=dtype, max_rank=max_rank
            )
        return Adapter(blocks=blocks)

    def check_blocks(self, block_path: str, num_blocks: int) -> None:
        """Raises ``ConfigurationError`` if the adapter changes no block, or one that the model does not have."""
        pattern = _block_pattern(block_path)
        indices = {int(place[1]) for name in self.entries if (place := pattern.search(name))}
        if not indices:
            raise self._misfit(f"it changes no blocks ({block_path}.0 to {num_blocks - 1})")
        if max(indices) >= num_blocks:
            raise self._misfit(f"it changes block {max(indices)}, and the model has {num_blocks}")

    def _find_layer(self, path: str, shapes: LayerShapes, model_type: str, name: str) -> str:
        if path in shapes:
            return path
        for old, new in _renamings(model_type):
            renamed = f".{path}.".replace(old, new).strip(".")
            if renamed in shapes:
                return renamed
        raise self._misfit(
            f"its {name} changes {path}, which is no linear layer of the model's blocks ({', '.join(sorted(shapes))})"
        )

    def _read_layer(
        self, prefix: str, shape: tuple[int, int], *, device: torch.device | str, dtype: torch.dtype, max_rank: int
    ) -> LowRank:
        name_a, name_b = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
        if name_b not in self.entries:
            raise self._misfit(f"it has {name_a} and no {name_b}")
        a, b = self.entries[name_a], self.entries[name_b]
        rank = a.shape[0] if a.shape else 0
        if rank > max_rank:
            raise ConfigurationError(f"adapter {self.source} has rank {rank} at {prefix}: at most {max_rank} is taken")
        if (a.shape, b.shape) != ((rank, shape[0]), (shape[1], rank)) or not rank:
            raise self._misfit(
                f"its matrices of {prefix} are {list(a.shape)} and {list(b.shape)}, and the layer has {shape[0]} "
                f"inputs and {shape[1]} outputs"
            )
        return LowRank(
            down_KI=self.read(name_a).to(device=device, dtype=dtype),
            up_OK=self.read(name_b).to(device=device, dtype=dtype),
            scaling=self.settings.scaling(prefix, rank),
        )

    def _misfit(self, reason: str) -> ConfigurationError:
        base = self.config.get("base_model_name_or_path")
        return ConfigurationError(
            f"adapter {self.source} does not fit this model: {reason}; it was trained for {base or 'another one'}"
        )


def _block_pattern(block_path: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.){re.escape(block_path)}\.(\d+)\.")


def _read_settings(config: Mapping[str, Any], source: Source) -> AdapterSettings:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigurationError(f"adapter {source} is of the kind {str(kind)[:40]}: only LORA can be used")
    for name, what in _REFUSED.items():
        if config.get(name):
            raise ConfigurationError(f"adapter {source} has {name}: {what} can't be used here")
    if config.get("bias", "none") != "none":
        raise ConfigurationError(f"adapter {source} has biases ({config['bias']}): train it with bias='none'")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    is_sound = type(rank) is int and rank > 0 and type(alpha) in (int, float) and math.isfinite(alpha or 0)
    if not is_sound or not all(_is_pattern(each) for each in patterns):
        raise CheckpointError(f"{CONFIG} of {source} is broken: r, lora_alpha or their patterns are not numbers")
    assert isinstance(alpha, (int, float))
    return AdapterSettings(
        alpha=alpha,
        alpha_pattern=patterns[1],
        is_rank_stabilized=config.get("use_rslora") is True,
    )


def _is_pattern(value: object) -> bool:
    if not isinstance(value, dict) or len(value) > 4096:
        return False
    for pattern, number in value.items():
        if type(number) not in (int, float) or not math.isfinite(number):
            return False
        # Patterns are names with dots, stars and the like. Anything by which a regular expression could take for ever
        # is not among them.
        if not re.fullmatch(r"[\w.^$|\\*-]{1,200}", pattern) or pattern.count("*") > 2:
            return False
    return True


def _renamings(model_type: str) -> list[tuple[str, str]]:
    """Parts of names that Transformers has changed in this family since adapters for it were first trained.

    Relies on Transformers' list of what it renames when it loads checkpoints.
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    return [
        (each.source_patterns[0], each.target_patterns[0])
        for each in get_checkpoint_conversion_mapping(model_type) or ()
        if type(each) is WeightRenaming
    ]


# --- writing ----------------------------------------------------------------------------------------------------------


def save_adapter(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter as PEFT does; ``tensors`` go by their names in the model."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
