"""What Transformers does around its blocks, as far as its documentation says too little of it: splitting and loading.

Each function says what it relies on. Private names are in ``transformers_private``. Read against 5.17 and 5.23.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from petals_core.errors import CheckpointError, InvalidRequestError, NotEnoughMemoryError, UnsupportedModelError
from petals_core.models import transformers_caches as caches
from petals_core.models.transformers_private import is_stateful
from petals_core.models.transformers_quantization import shared_modules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from petals_core.models.checkpoint import Checkpoint, LazyTensor

CONTINUED_BY_TOKENS: Final[dict[str, str]] = {
    "jamba": "its scan over several tokens begins with an empty state, whatever the cache holds",
}
"""Families that go on from a cache by single tokens only, and why. The first tokens of a cache go in together."""

_loading: Final = threading.Lock()


# --- finding the parts ------------------------------------------------------------------------------------------------


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
            f"{config.model_type} can't be built from this config ({_first_line(error)}): compare it with the original"
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


# --- cutting ----------------------------------------------------------------------------------------------------------


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
        _set_multiplier(model, path)
    _keep_blocks(model, block_path, start, end)


def _set_multiplier(model: nn.Module, path: str) -> None:
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


def make_subclass(base: type[PreTrainedModel], after_init: Callable[[PreTrainedModel], None]) -> type[PreTrainedModel]:
    """A subclass under the same name whose constructor ends with ``after_init``.

    ``from_pretrained`` builds the model on the meta device by calling its class, and loads whatever the result wants:
    the only hook between the two is a class of our own. Names and module stay because Transformers looks up losses
    and weight conversions by them.
    """

    def __init__(self: Any, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:  # noqa: N807
        base.__init__(self, config, *args, **kwargs)
        after_init(self)

    body = {"__init__": __init__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a base model does around its blocks, found out by running it without them."""

    blocks_return_tuples: bool
    """Whether it takes element 0 of what a block returns (bloom, falcon, mpt, bamba) or all of it."""
    multipliers: tuple[str, ...]
    """Attributes by which it multiplies hidden states on their way to the blocks, as the client's part has done."""


class _Probe(nn.Module):
    """Stands for a block, returns what comes in, and notes whether the embeddings come in a second time."""

    attention_type = block_type = layer_type = "full_attention"

    def __init__(self) -> None:
        super().__init__()
        self.returns_tuple = False
        self.sees_embeddings = False

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        self.sees_embeddings |= any(
            isinstance(other, torch.Tensor) and other.shape == hidden.shape and torch.equal(other, hidden)
            for other in (*args, *kwargs.values())
        )
        return (hidden, None) if self.returns_tuple else hidden


def find_surroundings(model: PreTrainedModel, block_path: str, hidden_size: int) -> Surroundings:
    """Make sure that a base model without its blocks leaves hidden states as they are, or learn what keeps it from it.

    ``model`` is neutralized and on the meta device; its blocks are replaced. A block that returns a tensor of
    [2, 3, H] where a tuple is wanted makes the model end with the first row alone.

    Raises:
        UnsupportedModelError: it changes hidden states in an unknown way, or gives blocks more than hidden states.
    """
    name = model.config.model_type
    probe = _Probe()
    parent_path, _, attribute = block_path.rpartition(".")
    setattr(model.get_submodule(parent_path), attribute, nn.ModuleList([probe]))
    slice_config(model.config, model.config.num_hidden_layers, 0, 1)
    model.to_empty(device="cpu")  # what is left are small buffers, whose values do not matter here
    model.eval()
    hidden = torch.linspace(-1.0, 2.0, 2 * 3 * hidden_size).view(2, 3, hidden_size)

    def run() -> torch.Tensor:
        try:
            with torch.inference_mode():
                output: torch.Tensor = model(
                    inputs_embeds=hidden,
                    past_key_values=caches.new_cache(model.config),
                    use_cache=True,
                    return_dict=True,
                ).last_hidden_state
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} can't be split: it does not run without its blocks ({_first_line(error)})"
            ) from error
        return output

    output = run()
    if output.shape != hidden.shape:
        probe.returns_tuple = True
        output = run()
    multipliers: tuple[str, ...] = ()
    if output.shape == hidden.shape and not torch.equal(output, hidden):
        multipliers = _find_multipliers(model, float((output / hidden).median()))
        for path in multipliers:
            _set_multiplier(model, path)
        output = run()
    if output.shape != hidden.shape or not torch.equal(output, hidden):
        raise UnsupportedModelError(f"{name} can't be split: it changes hidden states outside of its blocks")
    if probe.sees_embeddings:
        raise UnsupportedModelError(
            f"{name} can't be split: its blocks read the embeddings again, which only the client has"
        )
    return Surroundings(blocks_return_tuples=probe.returns_tuple, multipliers=multipliers)


def _find_multipliers(model: nn.Module, factor: float) -> tuple[str, ...]:
    """Attributes of the model's modules that have the value of a factor and are named like one."""
    return tuple(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if ("multiplier" in name or "scal" in name)
        and isinstance(value, (int, float))
        and abs(value - factor) < 1e-5 * abs(factor)
    )


# --- loading ----------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet_and_sequential() -> Iterator[None]:
    """Load one tensor at a time, without Transformers' progress bar and its report of several lines.

    By default Transformers reads all tensors ahead in threads, so that converted weights (fused experts, another dtype)
    are held beside their sources; ``HF_DEACTIVATE_ASYNC_LOAD`` is its documented switch, read at each load. All three
    are settings of the process, hence the lock.
    """
    from transformers.utils import logging as transformers_logging

    with _loading:
        variable = "HF_DEACTIVATE_ASYNC_LOAD"
        before = os.environ.get(variable)
        verbosity = transformers_logging.get_verbosity()
        has_bar = transformers_logging.is_progress_bar_enabled()
        os.environ[variable] = "1"
        transformers_logging.set_verbosity(max(verbosity, logging.ERROR))
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
            transformers_logging.set_verbosity(verbosity)
            if has_bar:
                transformers_logging.enable_progress_bar()


def load(
    model_class: type[PreTrainedModel],
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    tensors: MutableMapping[str, LazyTensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    quantization_config: object | None = None,
    is_head_optional: bool = False,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """``from_pretrained`` with a state dict that is read lazily.

    Returns:
        The model, and the names of weights that the checkpoint lacks and that were initialised as Transformers does.

    Raises:
        CheckpointError: config and tensors do not fit together.
        NotEnoughMemoryError: the weights do not fit the device.
    """
    arguments: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "state_dict": tensors}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    if checkpoint.generation_config is not None and model_class.can_generate():
        arguments["generation_config"] = checkpoint.generation_config
    is_quantized = quantization_config is not None or getattr(config, "quantization_config", None) is not None
    if device.type != "cpu" or is_quantized:
        arguments["device_map"] = {"": device}
    try:
        with _quiet_and_sequential():
            loaded: Any = model_class.from_pretrained(None, config=config, **arguments)
    except torch.OutOfMemoryError:
        raise NotEnoughMemoryError(f"the weights do not fit the memory of {device}: serve fewer blocks") from None
    except (RuntimeError, ValueError, KeyError) as error:
        if "allocate memory" in str(error):  # what torch says of the CPU's memory, in an error of no class of its own
            raise NotEnoughMemoryError(f"the weights do not fit the memory of {device}: serve fewer blocks") from None
        if "attention" in str(error) and attn_implementation is not None:
            raise InvalidRequestError(f"{config.model_type} can't use {attn_implementation} attention") from None
        raise CheckpointError(
            f"the tensors of {checkpoint.name} do not fit its config ({_first_line(error)}): "
            "copy or download the checkpoint again"
        ) from error
    model: PreTrainedModel = loaded[0]
    missing = frozenset[str](loaded[1]["missing_keys"])
    if is_head_optional:
        prefix = model.base_model_prefix + "."
        is_base = model.base_model is model
        required = frozenset(name for name in missing if is_base or name.startswith(prefix))
    else:
        required = missing
    if required:
        raise CheckpointError(
            f"{checkpoint.name} lacks {len(required)} tensors that its config asks for, {min(required)} among them: "
            "copy or download the checkpoint again"
        )
    return model, missing


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def drop_tied_twins(model: PreTrainedModel, checkpoint: Checkpoint, tensors: MutableMapping[str, LazyTensor]) -> None:
    """Forget tensors that are stored twice because they are tied, before both copies are read.

    Relies on ``all_tied_weights_keys`` (set by ``post_init``): each tied name and the name it is tied to. Copies that
    differ are both left, and Transformers does not tie them.
    """
    prefix = model.base_model_prefix + "."
    for target, source in model.all_tied_weights_keys.items():
        stored = [
            next((name for name in (key, key.removeprefix(prefix)) if name in tensors), None)
            for key in (target, source)
        ]
        if stored[0] is not None and stored[1] is not None and stored[0] != stored[1]:
            names = (tensors[stored[0]].name, tensors[stored[1]].name)
            if checkpoint.is_same(*names):
                del tensors[stored[0]]


def fuse_experts(model: PreTrainedModel, tensors: MutableMapping[str, LazyTensor]) -> None:
    """Have experts that are stored one by one read straight into the tensor that holds all of a block's.

    Transformers stacks them and concatenates the stacks, which takes up to three times a block's experts for a moment:
    with one block on a server, more than the server's budget. This does the two conversions that it knows
    (``MergeModulelist``, alone or followed by a ``Concatenate`` of rows) in place, and leaves all others to
    Transformers, as well as tensors whose number or shapes are not what the model wants.

    Relies on ``get_model_conversion_mapping``, ``rename_source_key``, ``dot_natural_key`` (the order of the experts)
    and on a tensor that comes under its final name being taken as it is.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    from petals_core.models.checkpoint import FusedTensor

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    sources_of: dict[str, list[str]] = {}
    for converter in converters:
        operations: list[Any] = list(converter.operations)
        kinds = [type(operation) for operation in operations]
        if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]):
            continue
        if [operation.dim for operation in operations] == [0, 1][: len(operations)]:
            sources_of.update({source: list(converter.source_patterns) for source in converter.source_patterns})
    if not sources_of:
        return
    wanted = model.state_dict()
    groups: dict[str, dict[str, list[str]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, source = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if source in sources_of and target in wanted:
            groups.setdefault(target, {}).setdefault(source, []).append(name)
    for target, names_of in groups.items():
        columns = [names_of.get(source, []) for source in sources_of[next(iter(names_of))]]
        num_experts, num_rows, *rest = wanted[target].shape
        if any(len(column) != num_experts for column in columns):
            continue
        parts = [[tensors[column[index]] for column in columns] for index in range(num_experts)]
        if all(
            sum(part.shape[0] for part in row) == num_rows and all(list(part.shape[1:]) == rest for part in row)
            for row in parts
        ):
            for column in columns:
                for name in column:
                    del tensors[name]
            tensors[target] = FusedTensor(target, parts, wanted[target].shape, wanted[target].dtype)
