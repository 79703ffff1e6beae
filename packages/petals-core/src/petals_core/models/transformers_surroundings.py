"""What a base model of Transformers does to hidden states around its blocks, found out by running it without them.

Each function says what it relies on. Read against Transformers 5.17 and 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from petals_core.errors import UnsupportedModelError, first_line
from petals_core.models import transformers_caches as caches
from petals_core.models.transformers_cutting import set_multiplier, slice_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
                f"{name} can't be split: it does not run without its blocks ({first_line(error)})"
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
            set_multiplier(model, path)
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
