"""What was trained, in a folder or a repository on the hub: a safetensors file and a small card, without the model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from petals_client.lora import LoraSettings
from petals_client.peft_weights import PeftWeights
from petals_core.errors import CheckpointError, ConfigurationError
from petals_core.models.adapter_files import CONFIG as ADAPTER_CONFIG
from petals_core.models.adapter_files import AdapterFiles
from petals_core.models.safetensors_file import read_header, read_tensor
from petals_core.models.sources import Source, open_source, read_json

CARD: Final = "petals_tuning.json"
WEIGHTS: Final = "model.safetensors"
"""The name by which ``transformers.Trainer`` finds it when it resumes."""
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningCard:
    """What the trained weights belong to."""

    format: int = _FORMAT
    base_model: str
    """Name or path of the checkpoint, as it was loaded."""
    fingerprint: str
    model_class: str
    """Transformers' class."""
    tuning_mode: str | None
    pre_seq_len: int
    lora: LoraSettings | None = None


def save(folder: str | os.PathLike[str], card: TuningCard, tensors: dict[str, Tensor]) -> None:
    """Write card, tensors, and a README for the hub."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")
    (folder / "README.md").write_text(_readme(card))


def _readme(card: TuningCard) -> str:
    if card.lora is not None:
        return (
            f"---\nbase_model: {json.dumps(card.base_model)}\nlibrary_name: peft\ntags:\n- lora\n- petals\n---\n\n"
            f"A LoRA adapter for {card.base_model}, trained through a Petals swarm, as PEFT stores it. Servers load it "
            "with `petals-server serve BASE_MODEL --adapters THIS`; `from_pretrained(BASE_MODEL, tuned=THIS, "
            f"initial_peers=...)` trains it further. `{WEIGHTS}` and `{CARD}` hold the same for Petals alone.\n"
        )
    what = "Weights" if card.tuning_mode is None else f"Prompts ({card.tuning_mode}, {card.pre_seq_len} tokens)"
    return (
        f"---\nbase_model: {json.dumps(card.base_model)}\nlibrary_name: petals\ntags:\n- petals\n---\n\n"
        f"{what} for {card.base_model}, trained through a Petals swarm. `{CARD}` says what they are, `{WEIGHTS}` holds "
        "them. Load both with `from_pretrained(BASE_MODEL, tuned=THIS, initial_peers=...)`.\n"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedWeights:
    """Trained weights where they are stored; nothing but the card is read yet."""

    source: Source
    card: TuningCard

    def load_into(self, model: nn.Module) -> None:
        """Copy the tensors into the model's parameters of the same names, and let these train.

        Raises:
            CheckpointError: the file is broken.
            ConfigurationError: the model has no such parameters.
        """
        path = self.source.path(WEIGHTS)
        entries = read_header(path, WEIGHTS)
        parameters = dict(nn.Module.named_parameters(model))
        for name, entry in entries.items():
            parameter = parameters.get(name)
            tensor = read_tensor(path, entry)
            if parameter is None or parameter.shape != tensor.shape:
                raise ConfigurationError(
                    f"{self.source} has a weight {name} of shape {list(tensor.shape)}, and this model has "
                    f"{'none of that name' if parameter is None else f'one of shape {list(parameter.shape)}'}: "
                    f"it was trained with {self.card.model_class} of {self.card.base_model}"
                )
            parameter.data.copy_(tensor)
            parameter.requires_grad_(True)


def is_tuned_folder(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder with trained weights and no model."""
    folder = Path(name_or_path)
    return (folder / CARD).is_file() and not (folder / "config.json").exists()


def open_tuned(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    prefers_peft: bool = False,
) -> TunedWeights | PeftWeights:
    """Find what ``save`` or PEFT wrote, in a folder or on the hub; where both are, ``prefers_peft`` says which.

    Raises:
        CheckpointError: there is nothing of the kind, or it can't be read.
    """
    source = open_source(
        name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    path = source.find(CARD)
    if (path is None or prefers_peft) and source.find(ADAPTER_CONFIG) is not None:
        return PeftWeights(files=AdapterFiles(source, "adapter"))
    if path is None:
        raise CheckpointError(f"{source} has no {CARD}: it holds no weights that save_pretrained wrote")
    return TunedWeights(source=source, card=_read_card(read_json(path), source))


def _read_card(content: dict[str, Any], source: Source) -> TuningCard:
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"{source} is of format {content.get('format')!r}, and this version reads {_FORMAT}")
    kinds = {"base_model": str, "fingerprint": str, "model_class": str, "pre_seq_len": int}
    for name, kind in kinds.items():
        if type(content.get(name)) is not kind:
            raise CheckpointError(f"{CARD} of {source} is broken: {name} is {content.get(name)!r}")
    mode = content.get("tuning_mode")
    if mode is not None and type(mode) is not str:
        raise CheckpointError(f"{CARD} of {source} is broken: tuning_mode is {mode!r}")
    lora = content.get("lora")
    return TuningCard(
        tuning_mode=mode,
        lora=None if lora is None else _read_lora(lora, source),
        **{name: content[name] for name in kinds},
    )


def _read_lora(content: Any, source: Source) -> LoraSettings:
    names = ("rank", "alpha", "target_modules", "is_rank_stabilized")
    if not isinstance(content, dict) or not all(name in content for name in names):
        raise CheckpointError(f"{CARD} of {source} is broken: lora is {content!r}")
    rank, alpha, targets, is_stabilized = (content[name] for name in names)
    if type(rank) is not int or type(alpha) not in (int, float) or not isinstance(targets, list):
        raise CheckpointError(f"{CARD} of {source} is broken: lora is {content!r}")
    return LoraSettings(
        rank=rank, alpha=alpha, target_modules=tuple(map(str, targets)), is_rank_stabilized=is_stabilized is True
    )


def push(folder: str | Path, repo_id: str, *, token: str | None, private: bool | None, message: str) -> str:
    """Upload a folder to a repository on the hub, made if it does not exist; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=url.repo_id, commit_message=message)
    return str(url)
