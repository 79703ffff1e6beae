"""Quantized weights: what Transformers' own quantizers and bitsandbytes make of a span, and what needs care about them.

Relies on ``AutoHfQuantizer`` and ``validate_environment`` of Transformers, on its lists of modules to leave alone, and
on how bitsandbytes keeps 4-bit weights. Read against Transformers 5.17 and 5.23 and bitsandbytes 0.50.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from petals_core.announcement import QUANTIZATIONS
from petals_core.errors import ConfigurationError, UnsupportedModelError, first_line
from petals_core.models.memory import HeapTrimmer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WANTED: Final = ("auto", "none", "int8", "nf4")
"""What a host may ask for. ``auto`` is nf4 on a GPU and none on a CPU."""

_WEIGHT_BYTES: Final = {"nf4": 0.5625, "fp4": 0.5625, "mxfp4": 0.54, "gptq": 0.6, "awq": 0.6, "int8": 1.01, "fp8": 1.01}
"""Memory of one weight with its share of scales; of nf4: 4 bits, and a float32 for each 64 weights."""
_SKIP_LISTS: Final = ("llm_int8_skip_modules", "modules_to_not_convert")
"""Where quantization configs name the modules that they leave alone."""
_NOISY: Final = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
"""These advise to install more packages, and say in each step that activations are cast."""
_PLAIN_LINEAR: Final = frozenset({"FalconLinear"})
"""Classes derived from ``Linear`` that compute what it does."""
_PACKED_ROWS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What becomes of a model's weights on one device."""

    name: str
    """Their form once they are loaded, as it is announced: one of ``QUANTIZATIONS``."""
    is_stored: bool = False
    """Whether the checkpoint is stored quantized; its ``name`` is none where the device needs plain weights."""
    config: Any = None
    """Transformers' config for quantizing while it loads; None to take the weights as they are stored."""

    def block_bytes(self, num_parameters: int, num_linear: int, dtype: torch.dtype) -> int:
        """Estimate the memory of a block, of whose weights ``num_linear`` are in linear layers."""
        weight_bytes = _WEIGHT_BYTES.get(self.name, dtype.itemsize)
        return int(num_linear * weight_bytes) + (num_parameters - num_linear) * dtype.itemsize


NONE: Final = Quantization(name="none")


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """How a checkpoint's weights are stored: one of ``QUANTIZATIONS``, or None where they are not quantized."""
    settings = _settings(config)
    if settings is None:
        return None
    method = str(settings.get("quant_method") or "")
    if settings.get("load_in_4bit"):
        method = str(settings.get("bnb_4bit_quant_type") or "fp4")
    elif settings.get("load_in_8bit"):
        method = "int8"
    return method if method in QUANTIZATIONS else "other"


def _settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    value: Any = getattr(config, "quantization_config", None)
    if value is None:
        return None
    return dict(value) if isinstance(value, dict) else dict(value.to_dict())


def count_linear_parameters(block: nn.Module) -> int:
    """Elements of the weights that quantizers take: those of ``Linear``, and of gpt2's transposed ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    layers = (
        module
        for module in block.modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D) or type(module).__name__ in _PLAIN_LINEAR
    )
    return sum(layer.get_parameter("weight").numel() for layer in layers)


def make_linear_layers_plain(model: nn.Module) -> None:
    """Make layers of families' own classes that compute the same ``Linear``, which is all that quantizers take."""
    for module in model.modules():
        if type(module).__name__ in _PLAIN_LINEAR:
            module.__class__ = nn.Linear


def plan(
    config: PreTrainedConfig, wanted: str, *, device: torch.device, dtype: torch.dtype, num_linear: int
) -> Quantization:
    """Decide what becomes of a checkpoint's weights, and make sure that it can be done here.

    Args:
        wanted: one of ``WANTED``. Weights that are stored quantized are taken as they are, unless something else is
            asked for by name.
        num_linear: how many weights are in linear layers.

    Raises:
        ConfigurationError: ``wanted`` contradicts how the weights are stored.
        UnsupportedModelError: a library or a device that the quantization needs is missing, or there is nothing that it
            could be done to.
    """
    if wanted not in WANTED:
        raise ConfigurationError(f"quantization {wanted} is none of {', '.join(WANTED)}")
    stored = stored_quantization(config)
    if stored is not None:
        if wanted not in ("auto", "none", stored):
            raise ConfigurationError(
                f"this checkpoint is stored in {_method(config)} and can't be made {wanted}: leave --quantization out, "
                "or use the unquantized checkpoint"
            )
        is_expanded = _check_available(_settings(config) or {}, config, device)
        return Quantization(name="none" if is_expanded else stored, is_stored=True)
    if wanted == "auto":
        wanted = "nf4" if device.type == "cuda" else "none"
    if wanted == "none":
        return NONE
    if num_linear == 0:
        raise UnsupportedModelError(
            f"{config.model_type} keeps its weights in no layers that can be quantized: leave --quantization out"
        )
    from transformers import BitsAndBytesConfig

    kind = {"load_in_8bit": True} if wanted == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    # An empty list, because by default the module with the last parameter is left alone: it is meant for a head, but in
    # a span it would be a layer of the last block.
    settings = BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=[], **kind)
    _check_available(settings.to_dict(), config, device)
    return Quantization(name=wanted, config=settings)


def _method(config: PreTrainedConfig) -> str:
    stored = stored_quantization(config)
    settings = _settings(config) or {}
    return str(settings.get("quant_method")) if stored == "other" else str(stored)


def _check_available(settings: dict[str, Any], config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether Transformers would turn the weights back into plain ones while loading, for want of kernels."""
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils import logging as transformers_logging

    _silence()
    is_stored = _settings(config) is not None
    if is_stored and not _is_known(settings):
        raise UnsupportedModelError(
            f"this checkpoint is stored quantized in {_method(config)}, which this version of Transformers does not "
            "know: upgrade transformers, or use the unquantized checkpoint"
        )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        quantizer: Any = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=is_stored)
        quantizer.validate_environment(device_map={"": device}, weights_only=True)
    except Exception as error:  # each method's quantizer has errors of its own for what it misses
        what = f"is stored quantized in {_method(config)}, which" if is_stored else "can't be quantized: bitsandbytes"
        raise UnsupportedModelError(
            f"this checkpoint {what} can't be used on {device} here ({first_line(error)}): install what is missing, or "
            "use the unquantized checkpoint"
        ) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    return bool(getattr(quantizer.quantization_config, "dequantize", False))


def _is_known(settings: dict[str, Any]) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = settings.get("quant_method") or "bitsandbytes"
    return method == "bitsandbytes" or method in AUTO_QUANTIZATION_CONFIG_MAPPING


def _silence() -> None:
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


# --- loading ----------------------------------------------------------------------------------------------------------


def span_config(config: PreTrainedConfig, block_path: str, start: int, end: int) -> PreTrainedConfig:
    """A copy of the config of a checkpoint that is stored quantized, to load blocks ``start`` up to ``end`` with.

    Modules that are left alone are named with the number of their block, and by default it is the module with the last
    parameter, which in a whole model belongs to the head.
    """
    config = copy.deepcopy(config)
    settings = _settings(config)
    assert settings is not None
    block = re.compile(rf"(?:^|.*\.){re.escape(block_path)}\.(\d+)(?=\.|$)")
    for key in _SKIP_LISTS:
        if key not in settings:
            continue
        kept = []
        for name in settings[key] or ():
            match = block.match(name)
            if match is None:
                kept.append(name)
            elif start <= int(match[1]) < end:
                kept.append(f"{block_path}.{int(match[1]) - start}{name[match.end() :]}")
        settings[key] = kept
    config.quantization_config = settings
    return config


def client_config(config: PreTrainedConfig, dtypes: set[torch.dtype]) -> PreTrainedConfig:
    """The config to load a client's half with, which needs no quantizer where its tensors are stored unquantized.

    ``dtypes`` are those of the tensors outside of the blocks.
    """
    if _settings(config) is None or any(dtype.itemsize == 1 or not dtype.is_floating_point for dtype in dtypes):
        return config
    config = copy.copy(config)
    del config.quantization_config
    return config


def finish(model: PreTrainedModel, form: Quantization, dtype: torch.dtype) -> None:
    """Bring quantized weights that were just loaded into the form in which they are computed with.

    Transformers turns weights of types that the device can not compute with into bfloat16, whatever ``dtype`` is.
    """
    if form.is_stored and form.name == "none":
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
    if not _bitsandbytes_is_used(model):
        return
    from bitsandbytes.nn.modules import Linear4bit

    trimmer = HeapTrimmer()
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            _pack(module)
            trimmer.note(14 * module.weight.nbytes)  # packing unpacks two weights of a byte to 32 bits each, and to 8


def _bitsandbytes_is_used(model: nn.Module) -> bool:
    return any(
        kind.__module__.startswith("bitsandbytes") for module in model.modules() for kind in type(module).__mro__
    )


def _pack(module: Any) -> None:
    """Change a layer for the fast kernel of CPUs with bfloat16 now, instead of in the first step.

    bitsandbytes does it when it first computes and by changing the weight in place: in the middle of somebody's step,
    with an ``AssertionError`` for widths that the kernel can't do, and without a gradient afterwards.
    """
    if not module.support_avx512bf16_for_cpu:
        return
    state = module.weight.quant_state
    num_rows, num_columns = state.shape
    if num_rows % _PACKED_ROWS or num_columns % state.blocksize:
        module.support_avx512bf16_for_cpu = False
        return
    module.eval()
    with torch.no_grad():
        module(torch.zeros(1, num_columns, dtype=module.compute_dtype or torch.bfloat16))
    if getattr(state, "packing_format_for_cpu", False):
        module.__class__ = _packed_class()


class _PackedProduct(torch.autograd.Function):
    """The kernel for packed weights, with a gradient: bitsandbytes has none and lets autograd go on without."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, module: Any) -> torch.Tensor:
        ctx.module = module
        return _plain_forward(module, hidden).clone()  # what is computed is a view, which nobody could add to in place

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        weight = unpacked_weight(ctx.module).to(gradient.dtype)
        return gradient @ weight, None


def _plain_forward(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.nn.modules import Linear4bit

    with torch.no_grad():
        result: torch.Tensor = Linear4bit.forward(module, hidden.detach())
        return result


@functools.cache
def _packed_class() -> type[nn.Module]:
    """Made when it is first wanted, because importing bitsandbytes takes a second."""
    from bitsandbytes.nn.modules import Linear4bit

    class PackedLinear4bit(Linear4bit):
        """A layer whose weight is packed for the CPU's kernel."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.requires_grad and torch.is_grad_enabled():
                product: torch.Tensor = _PackedProduct.apply(x, self)
                return product
            result: torch.Tensor = super().forward(x)
            return result

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            # The inherited one changes the weight back, and its scales not.
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    return PackedLinear4bit


def unpacked_weight(module: Any) -> torch.Tensor:
    """The weight [out, in] of a packed layer, in float32.

    A byte holds two weights: groups of 32 rows and 2 columns, row by row, the first half of a group in the low bits of
    its bytes and the second half in the high ones. Scales are [in / block, out].
    """
    state = module.weight.quant_state
    num_rows, num_columns = state.shape
    packed = module.weight.data.reshape(num_rows // _PACKED_ROWS, num_columns // 2, _PACKED_ROWS)
    codes = torch.cat([packed & 0xF, packed >> 4], dim=-1).view(-1, num_columns // 2, _PACKED_ROWS, 2)
    codes = codes.transpose(1, 2).reshape(-1)
    scales = state.absmax.float().t().reshape(num_rows, -1, 1)
    values = state.code.float().index_select(0, codes.to(torch.int32)).view(num_rows, -1, state.blocksize)
    return values.mul_(scales).view(num_rows, num_columns)


# --- what is there ----------------------------------------------------------------------------------------------------


def shared_modules(model: nn.Module) -> list[nn.Module]:
    """Quantized layers, whose scales are neither parameters nor buffers: copies of a model share them whole."""
    if not _bitsandbytes_is_used(model):
        return []
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return [module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))]


def num_bytes(model: nn.Module) -> int:
    """Memory of a model's weights with all that belongs to them."""
    if not _bitsandbytes_is_used(model):
        return sum(tensor.nbytes for tensor in model.state_dict().values())
    tensors: list[torch.Tensor] = [*model.parameters()]
    for weight in model.parameters():
        state: Any = getattr(weight, "quant_state", None)
        tensors += _tensors_of(state) + _tensors_of(getattr(state, "state2", None))
        tensors += [value for value in (getattr(weight, "SCB", None),) if isinstance(value, torch.Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _tensors_of(state: object) -> list[torch.Tensor]:
    return [value for value in vars(state).values() if isinstance(value, torch.Tensor)] if state is not None else []


def quantized_share(model: nn.Module) -> float:
    """Which part of a model's weights is quantized: what is not in linear layers, such as experts, may not be."""
    quantized = plain = 0
    for weight in model.parameters():
        state: Any = getattr(weight, "quant_state", None)
        if state is not None:
            quantized += int(torch.Size(state.shape).numel())
        elif not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
            quantized += weight.numel()
        else:
            plain += weight.numel()
    return quantized / max(1, quantized + plain)
