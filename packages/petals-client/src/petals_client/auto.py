"""Loading models whose blocks are remote: the names that users import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from petals_client.options import ClientOptions, as_choice
from petals_core.addresses import Address
from petals_core.errors import ConfigurationError, InvalidRequestError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from petals_client.chain import Chain
    from petals_client.lora import LoraSettings
    from petals_core.models.checkpoint import Checkpoint

_IGNORED = frozenset({"low_cpu_mem_usage", "use_safetensors", "offload_folder", "use_fast"})
"""Options of Transformers' ``from_pretrained`` that mean nothing here: accepted, so that scripts need no change."""


class _AutoDistributed:
    """``from_pretrained`` of one kind of model; the classes below differ by values only."""

    _mapping: ClassVar[str]
    """Transformers' mapping from config classes to model classes."""
    _model_type: ClassVar[str | None] = None
    """The only family that is taken; None: all."""

    def __init__(self) -> None:
        raise InvalidRequestError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        initial_peers: Sequence[str | Address],
        swarm_key_file: str | os.PathLike[str] | None = None,
        identity: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | dict[str, Any] | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        config: PreTrainedConfig | None = None,
        allowed_quantization: str | Sequence[str] | None = None,
        allowed_dtypes: str | torch.dtype | Sequence[str | torch.dtype] | None = None,
        allowed_servers: str | Sequence[str] | None = None,
        blocked_servers: str | Sequence[str] | None = None,
        options: ClientOptions | None = None,
        tuning_mode: str | None = None,
        pre_seq_len: int | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        target_modules: str | Sequence[str] | None = None,
        active_adapter: str | None = None,
        tuned: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load embeddings, final norm and head, and reach the blocks through the swarm.

        Args:
            name_or_path: a folder, or a name on the hub; the servers must hold the very same checkpoint. A folder of
                trained weights stands for the model that they were trained with.
            initial_peers: addresses ``HOST:PORT`` of some peers of the swarm.
            swarm_key_file: the key of a private swarm.
            identity: a file with a key, made if there is none: servers then know this client again. Of a server of
                yours: servers that prefer contributors count what it computed for others.
            dtype: what the client computes in; by default what the checkpoint is stored in. Or ``torch_dtype``.
            device_map: the device of the client's part: a name such as ``"cuda"``, or ``{"": device}``.
            trust_remote_code: whether code that comes with the checkpoint is run where Transformers has no such family.
            config: instead of the checkpoint's own (a classifier's labels, say); what is not known by name here goes to
                the config too, as in Transformers (``num_labels=3``).
            allowed_quantization: forms of weights that servers may run, ``["none", "int8"]`` for example; by default
                any, and what is lossy is said.
            allowed_dtypes: what servers may compute in, ``["float32"]`` for example; by default anything.
            allowed_servers: peer ids, or their first 8 or more characters, of the only servers to use; by default any.
            blocked_servers: the same of servers never to use.
            options: time limits and the like.
            tuning_mode: ``"ptune"`` to train prompts before every row, ``"deep_ptune"`` at every block too,
                ``"lora"`` to train low-rank matrices of the blocks' linear layers.
            pre_seq_len: how many virtual tokens these prompts have; 16 by default.
            lora_rank, lora_alpha, target_modules: of these matrices: 8, 16, and the layers of queries and values by
                default; names of layers as PEFT has them, or ``"all-linear"``.
            active_adapter: an adapter that servers have loaded, by the name that they announce.
            tuned: a folder, or a name on the hub, with weights that ``save_pretrained`` of such a model wrote, or
                PEFT: with ``active_adapter`` only what lies outside of the blocks is loaded, else it trains further.

        Returns:
            An instance of the class of Transformers for this checkpoint, with ``inference_session`` besides.

        Raises:
            CheckpointError, UnsupportedModelError: the model can't be read or split.
            ConfigurationError: an option is wrong, or the checkpoint is of another family.
            NoPeersError: none of the initial peers answers.
        """
        from petals_client.lora import LoraSettings, as_settings
        from petals_client.peft_weights import PeftWeights
        from petals_client.tuned_weights import is_tuned_folder, open_tuned
        from petals_client.tuning import check_mode
        from petals_core.models.architecture import find_architecture
        from petals_core.models.checkpoint import Checkpoint

        access: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        if tuned is None and is_tuned_folder(name_or_path):
            tuned = name_or_path
        trained = None if tuned is None else open_tuned(tuned, **access, prefers_peft=active_adapter is not None)
        lora = as_settings(lora_rank, lora_alpha, target_modules)
        if isinstance(trained, PeftWeights):
            if tuning_mode is None and active_adapter is None:
                tuning_mode = "lora"
            if tuning_mode == "lora":
                lora = trained.settings()
        elif trained is not None:
            if tuned == name_or_path:
                name_or_path = trained.card.base_model
            tuning_mode = tuning_mode or trained.card.tuning_mode
            pre_seq_len = pre_seq_len or trained.card.pre_seq_len
            lora = trained.card.lora or lora
        if tuning_mode != "lora" and lora != LoraSettings():
            raise ConfigurationError("lora_rank, lora_alpha and target_modules need tuning_mode='lora'")
        num_prompts = check_mode(tuning_mode, pre_seq_len)
        checkpoint = Checkpoint.open(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
        config = cls._configure(checkpoint, config, kwargs)
        options = options or ClientOptions.make(
            initial_peers=initial_peers, swarm_key_file=swarm_key_file, identity=identity
        )
        wishes: dict[str, Any] = {
            "allowed_quantization": allowed_quantization,
            "allowed_dtypes": allowed_dtypes,
            "allowed_servers": allowed_servers,
            "blocked_servers": blocked_servers,
        }
        wishes = {name: as_choice(wish) for name, wish in wishes.items() if wish is not None}
        options = replace(options, **wishes)
        from petals_client.swarm_chain import SwarmChain

        if dtype is None:
            dtype = "auto" if torch_dtype is None else torch_dtype
        chain = SwarmChain.connect(checkpoint, options, dtype=dtype)
        try:
            model = load_model(
                checkpoint,
                mapping=cls._mapping,
                chain=chain,
                dtype=dtype,
                device=_single_device(device_map),
                config=config,
                tuning_mode=tuning_mode,
                num_prompts=num_prompts,
                lora=lora,
            )
            if active_adapter is not None:
                chain.check_adapter(active_adapter)
                model.remote_blocks.active_adapter = active_adapter
            if Path(name_or_path).is_dir():
                model.petals_origin = replace(model.petals_origin, name=str(Path(name_or_path).resolve()))
            if isinstance(trained, PeftWeights):
                trained.load_into(model, model.remote_blocks.tuned_adapter, find_architecture(config))
            elif trained is not None:
                trained.load_into(model)
            return model
        except BaseException:
            chain.close()
            raise

    @classmethod
    def _configure(
        cls, checkpoint: Checkpoint, config: PreTrainedConfig | None, overrides: dict[str, Any]
    ) -> PreTrainedConfig:
        import copy

        config = copy.deepcopy(checkpoint.config if config is None else config)
        if cls._model_type not in (None, config.model_type):
            raise ConfigurationError(
                f"{checkpoint.name} is a {config.model_type} model: load it with "
                f"{_name_for(cls._mapping)} instead of {cls.__name__}"
            )
        for name, value in overrides.items():
            if name in _IGNORED:
                continue
            if not hasattr(config, name):
                raise ConfigurationError(f"from_pretrained has no option {name}, nor has this model's config")
            setattr(config, name, value)
        return config


class AutoDistributedModel(_AutoDistributed):
    """Base models: hidden states in, hidden states out."""

    _mapping = "MODEL_MAPPING"


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """Models that generate."""

    _mapping = "MODEL_FOR_CAUSAL_LM_MAPPING"


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """Models with a classifier's head."""

    _mapping = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"


class AutoDistributedConfig:
    """Configs, read as the models read them."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedConfig:
        """Read a checkpoint's config.

        Raises:
            CheckpointError, UnsupportedModelError: it can't be read.
        """
        from petals_core.models.checkpoint import Checkpoint

        return Checkpoint.open(name_or_path, revision=revision, token=token, cache_dir=cache_dir).config


_FAMILIES = {"Bloom": "bloom", "Falcon": "falcon", "Llama": "llama", "Mixtral": "mixtral"}
"""Families that users of earlier versions import by name; all others are loaded by the classes above."""
_KINDS: dict[str, type[_AutoDistributed]] = {
    "Model": AutoDistributedModel,
    "ForCausalLM": AutoDistributedModelForCausalLM,
    "ForSequenceClassification": AutoDistributedModelForSequenceClassification,
}
FAMILY_CLASSES: dict[str, type[_AutoDistributed]] = {
    f"Distributed{family}{kind}": type(
        f"Distributed{family}{kind}",
        (auto,),
        {"_model_type": model_type, "__module__": __name__, "__doc__": f"{auto.__doc__} Of the {model_type} family."},
    )
    for family, model_type in _FAMILIES.items()
    for kind, auto in _KINDS.items()
}


def load_model(
    checkpoint: Checkpoint,
    *,
    mapping: str,
    chain: Chain,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    tuning_mode: str | None = None,
    num_prompts: int = 0,
    lora: LoraSettings | None = None,
) -> Any:
    """Build the class of Transformers for a checkpoint around the blocks behind ``chain``.

    Raises:
        UnsupportedModelError, CheckpointError, ConfigurationError: see ``petals_core.models.client_half``.
    """
    import transformers

    from petals_client.base_model import BLOCKS_ATTRIBUTE, remote_base_class
    from petals_client.generation import distributed_class
    from petals_client.lora import LoraSettings, new_adapter, remote_layers
    from petals_client.remote_sequential import RemoteSequential
    from petals_client.tuned_model import Origin
    from petals_client.tuning import attach_prompts, freeze
    from petals_core.models.architecture import find_architecture
    from petals_core.models.client_half import load_client_half

    config = checkpoint.config if config is None else config
    try:
        model_class = getattr(transformers, mapping)[type(config)]
    except KeyError:
        raise ConfigurationError(
            f"Transformers has no such class for {config.model_type} models: load it with {_name_for('MODEL_MAPPING')}"
        ) from None
    if isinstance(model_class, (tuple, list)):
        model_class = model_class[0]
    architecture = find_architecture(config)
    blocks = RemoteSequential(chain, returns_tuple=architecture.blocks_return_tuples)
    model: Any = load_client_half(
        checkpoint,
        model_class,
        blocks=blocks,
        dtype="auto" if dtype is None else dtype,
        device=device,
        config=config,
    )
    # Classes change behind the loading, which looks up conversions by class. The module that iterates over the blocks
    # is the base model itself or (opt) a part of it, which some heads call directly.
    setattr(model.base_model, BLOCKS_ATTRIBUTE, architecture.block_path)
    owner_path, _, name = architecture.block_path.rpartition(".")
    owner = model.base_model.get_submodule(owner_path)
    setattr(owner, BLOCKS_ATTRIBUTE, name)
    owner.__class__ = remote_base_class(type(owner))
    stored = {model.base_model_prefix + "." + each for each in checkpoint.tensor_names} | {*checkpoint.tensor_names}
    freeze(model, model.base_model, lambda name: name in stored)
    blocks.add_module("remote", remote_layers(architecture.block_layers[0]))
    if tuning_mode == "lora":
        blocks.tuned_adapter = new_adapter(architecture, lora or LoraSettings(), dtype=model.dtype, device=model.device)
    elif tuning_mode is not None:
        embeddings = model.get_input_embeddings().weight
        attach_prompts(
            owner,
            embeddings,
            blocks,
            num_tokens=num_prompts,
            mode=tuning_mode,
            hidden_size=architecture.hidden_size,
        )
    model.__class__ = distributed_class(type(model))
    model.petals_origin = Origin(
        name=str(checkpoint.name), fingerprint=checkpoint.fingerprint, block_path=architecture.block_path
    )
    model.eval()
    return model


def _name_for(mapping: str) -> str:
    return next(kind.__name__ for kind in _KINDS.values() if kind._mapping == mapping)


def _single_device(device_map: str | torch.device | dict[str, Any] | None) -> torch.device | str:
    """The device of the client's part, which is too small to be spread over several."""
    if isinstance(device_map, dict):
        devices = {str(device) for device in device_map.values()}
        if len(devices) != 1:
            raise ConfigurationError("device_map names several devices: the client's part is small, give one device")
        device_map = devices.pop()
    if device_map is None:
        return "cpu"
    if device_map in ("auto", "balanced", "sequential"):
        import torch

        return torch.accelerator.current_accelerator() or "cpu"
    return device_map
