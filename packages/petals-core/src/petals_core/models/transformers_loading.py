"""``from_pretrained`` of Transformers for a part of a model, whose tensors are read one at a time.

Each function says what it relies on. Read against Transformers 5.17 and 5.23.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from petals_core.errors import CheckpointError, InvalidRequestError, NotEnoughMemoryError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from petals_core.models.checkpoint import Checkpoint, LazyTensor

_loading: Final = threading.Lock()


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


@contextmanager
def quiet_and_sequential() -> Iterator[None]:
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
    if attn_implementation is None and getattr(config, "attn_logit_softcapping", None) is not None:
        attn_implementation = "eager"  # Transformers 5.17 chooses sdpa for gemma2, which leaves the cap out
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
        with quiet_and_sequential():
            loaded: Any = model_class.from_pretrained(None, config=config, **arguments)
    except torch.OutOfMemoryError:
        raise NotEnoughMemoryError(f"the weights do not fit the memory of {device}: serve fewer blocks") from None
    except (RuntimeError, ValueError, KeyError) as error:
        if "allocate memory" in str(error):  # what torch says of the CPU's memory, in an error of no class of its own
            raise NotEnoughMemoryError(f"the weights do not fit the memory of {device}: serve fewer blocks") from None
        if "attention" in str(error) and attn_implementation is not None:
            raise InvalidRequestError(f"{config.model_type} can't use {attn_implementation} attention") from None
        raise CheckpointError(
            f"the tensors of {checkpoint.name} do not fit its config ({first_line(error)}): "
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
