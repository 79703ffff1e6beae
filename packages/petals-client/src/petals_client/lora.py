"""LoRA of remote blocks, trained by the client: its matrices are parameters here, and servers compute with them.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al. 2021); names and initial values are PEFT's.

Letters: I inputs of a layer, O outputs, K rank, V values of all matrices in one row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from petals_client.adaptation import TunedValues
from petals_core.errors import ConfigurationError
from petals_core.limits import MAX_ADAPTER_LAYERS, MAX_ADAPTER_RANK
from petals_core.models.architecture import Architecture
from petals_core.models.low_rank import LayerShapes, LoraLayout

DEFAULT_RANK: Final = 8
DEFAULT_ALPHA: Final = 16.0
_ALL: Final = "all-linear"
_USUAL_TARGETS: Final = (("q_proj", "v_proj"), ("query_key_value",), ("c_attn",), ("qkv_proj",), ("Wqkv",))
"""What is adapted where the user does not say: queries and values, or the layer in which they are fused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """What ``from_pretrained`` is told about matrices to be trained; None: the default."""

    rank: int | None = None
    alpha: float | None = None
    target_modules: str | tuple[str, ...] | None = None
    is_rank_stabilized: bool = False


class LowRankParameters(nn.Module):
    """The matrices of one layer of one block; A begins random and B with zeros, so that nothing is changed at first."""

    def __init__(self, shape: tuple[int, int], rank: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        inputs, outputs = shape
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))


class _Owner:
    """An identity that copies do not share."""

    def __deepcopy__(self, memo: object) -> _Owner:
        return _Owner()


class TunedAdapter(nn.Module):
    """The trainable matrices of a model's blocks, in float32 whatever the model computes in (float64 stays float64)."""

    def __init__(
        self,
        layout: LoraLayout,
        *,
        alpha: float,
        target_modules: Sequence[str],
        dtype: torch.dtype,
        device: Any = "cpu",
    ) -> None:
        super().__init__()
        self.layout = layout
        self.alpha = alpha
        self.target_modules = tuple(target_modules)
        """As the user named them."""
        self._owner = _Owner()
        self._last: TunedValues | None = None
        dtype = torch.float64 if dtype is torch.float64 else torch.float32
        for index in range(layout.start, layout.end):
            for path, shape in layout.adapted(index):
                *parents, name = f"{index}.{path}".split(".")
                place: nn.Module = self
                for parent in parents:
                    if not hasattr(place, parent):
                        place.add_module(parent, nn.Module())
                    place = place.get_submodule(parent)
                place.add_module(name, LowRankParameters(shape, layout.rank, dtype=dtype, device=device))

    @property
    def rank(self) -> int:
        return self.layout.rank

    @property
    def settings(self) -> LoraSettings:
        """By which the same matrices are made anew."""
        return LoraSettings(
            rank=self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
            is_rank_stabilized=not math.isclose(self.layout.scaling, self.alpha / self.rank),
        )

    def layers(self) -> Iterator[tuple[int, str, LowRankParameters]]:
        """Block, path in it, and matrices."""
        for index in range(self.layout.start, self.layout.end):
            for path, _ in self.layout.adapted(index):
                module = self.get_submodule(f"{index}.{path}")
                assert isinstance(module, LowRankParameters)
                yield index, path, module

    def join(self) -> Tensor:
        """All matrices in one row [V] on the CPU; gradients flow back to them."""
        return self.layout.join(
            {(index, path): (each.lora_A, each.lora_B) for index, path, each in self.layers()}
        ).cpu()

    def snapshot(self, row: Tensor) -> TunedValues:
        """What ``join`` returned, to be sent to servers."""
        values = row.detach()
        last = self._last
        if last is None or not torch.equal(last.values, values):  # NaN never is: then a new name does no harm
            last = self._last = TunedValues(
                layout=self.layout, values=values.clone(), values_id=_hash(self.layout, values), owner=self._owner
            )
        return last

    def peft_tensors(self, prefix: str) -> dict[str, Tensor]:
        """The matrices under PEFT's names; ``prefix`` is the path of the blocks in the model."""
        return {
            f"{prefix}.{index}.{path}.{name}.weight": tensor
            for index, path, each in self.layers()
            for name, tensor in (("lora_A", each.lora_A), ("lora_B", each.lora_B))
        }


def _hash(layout: LoraLayout, values: Tensor) -> bytes:
    about = repr((layout.start, layout.end, layout.layers, layout.rank, layout.scaling, values.dtype))
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    digest.update(values.contiguous().numpy().data.cast("B"))
    return digest.digest()


def new_adapter(
    architecture: Architecture, settings: LoraSettings, *, dtype: torch.dtype, device: torch.device
) -> TunedAdapter:
    """Fresh matrices for a model's blocks.

    Raises:
        ConfigurationError: the rank is out of range, or there are no such layers.
    """
    rank = DEFAULT_RANK if settings.rank is None else settings.rank
    alpha = DEFAULT_ALPHA if settings.alpha is None else settings.alpha
    if not 0 < rank <= MAX_ADAPTER_RANK:
        raise ConfigurationError(f"lora_rank is {rank}: choose 1 to {MAX_ADAPTER_RANK}")
    layers = choose_layers(architecture.block_layers, settings.target_modules)
    layout = LoraLayout(
        start=0,
        shapes=architecture.block_layers,
        layers=layers,
        rank=rank,
        scaling=alpha / (math.sqrt(rank) if settings.is_rank_stabilized else rank),
    )
    targets = sorted({path.rpartition(".")[2] for path in layers})
    return TunedAdapter(layout, alpha=alpha, target_modules=targets, dtype=dtype, device=device)


def choose_layers(shapes: Sequence[LayerShapes], target_modules: str | Iterable[str] | None) -> tuple[str, ...]:
    """Paths of the layers whose names are, or end with, one of ``target_modules``.

    Raises:
        ConfigurationError: a target names no layer of the blocks.
    """
    known = tuple(dict.fromkeys(path for each in shapes for path in each))
    names = {path.rpartition(".")[2] for path in known}
    if target_modules is None:
        target_modules = next((usual for usual in _USUAL_TARGETS if names.issuperset(usual)), None)
        if target_modules is None:
            raise ConfigurationError(f"give target_modules: which of {', '.join(sorted(names))} are to be adapted")
    if isinstance(target_modules, str):
        target_modules = known if target_modules == _ALL else (target_modules,)
    chosen: list[str] = []
    for target in target_modules:
        found = [path for path in known if path == target or path.endswith(f".{target}")]
        if not found:
            raise ConfigurationError(
                f"target_modules has {target!r}, which is no linear layer of the blocks: "
                f"there are {', '.join(sorted(names))}"
            )
        chosen += found
    layers = tuple(path for path in known if path in chosen)  # in the blocks' order, whatever the user's
    if not layers or len(layers) > MAX_ADAPTER_LAYERS:
        raise ConfigurationError(f"target_modules names {len(layers)} layers of a block: 1 to {MAX_ADAPTER_LAYERS}")
    return layers


def as_settings(rank: int | None, alpha: float | None, target_modules: Any) -> LoraSettings:
    """What the user gave; raises ``ConfigurationError`` if it is nothing of the kind."""
    if alpha is not None and not (isinstance(alpha, (int, float)) and math.isfinite(alpha)):
        raise ConfigurationError(f"lora_alpha is {alpha!r}: give a number")
    targets = target_modules if target_modules is None or isinstance(target_modules, str) else tuple(target_modules)
    return LoraSettings(rank=rank, alpha=alpha, target_modules=targets)


# --- what others look for in the blocks -------------------------------------------------------------------------------


class RemoteLayer(nn.Module):
    """Stands for a linear layer of the blocks where tools look for layers to adapt, so that their refusal says why."""

    def extra_repr(self) -> str:
        return (
            "computed by servers, so PEFT can't adapt it here: train it with from_pretrained(..., tuning_mode='lora', "
            "target_modules=[...]), or use an adapter that servers have with from_pretrained(..., active_adapter=NAME)"
        )


def remote_layers(shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A tree of ``RemoteLayer`` under the paths of a block's linear layers."""
    root = nn.Module()
    for path in shapes:
        *parents, name = path.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(name, RemoteLayer())
    return root
