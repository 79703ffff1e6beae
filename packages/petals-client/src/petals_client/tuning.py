"""Prompt tuning: virtual tokens before every row whose embeddings are trained, at the input or at every block.

Input prompts take the way of the tokens' own embeddings into the first block, whatever the family does there (norms,
positions, scales), as in "The Power of Scale for Parameter-Efficient Prompt Tuning" (Lester et al. 2021). Deep prompts
are added to the virtual tokens' states before each block, in the spirit of "P-Tuning v2" (Liu et al. 2021).

Letters: P virtual tokens, B blocks, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from petals_client.prefix import Prefix
from petals_client.remote_sequential import BlockCall, RemoteSequential, entered
from petals_core.errors import ConfigurationError
from petals_core.models.transformers_forward import BaseCall
from petals_core.models.transformers_structure import takes_position_ids

TUNING_MODES: Final = ("ptune", "deep_ptune", "lora")
DEFAULT_PROMPT_TOKENS: Final = 16
_MAX_PROMPT_TOKENS: Final = 4096
PROMPTS_ATTRIBUTE: Final = "tuned_prompts"
"""Where the module that iterates over the blocks keeps its ``TunedPrompts``."""


class TunedPrompts(nn.Module):
    """The trainable prompts of one model, in float32 whatever the model computes in (float64 stays float64)."""

    deep: nn.Parameter | None

    def __init__(
        self, *, embeddings: Tensor, num_blocks: int, hidden_size: int, num_tokens: int, is_deep: bool
    ) -> None:
        """``embeddings``: those of the vocabulary; prompts begin as those of random tokens, deep ones as zeros."""
        super().__init__()
        dtype = torch.float64 if embeddings.dtype is torch.float64 else torch.float32
        chosen = torch.randint(len(embeddings), (num_tokens,))
        self.input = nn.Parameter(embeddings.detach()[chosen.to(embeddings.device)].to(dtype).clone())
        """[P, width of the embeddings]"""
        self.deep = (
            nn.Parameter(torch.zeros(num_blocks, num_tokens, hidden_size, dtype=dtype, device=embeddings.device))
            if is_deep
            else None
        )
        """[B, P, H]"""

    @property
    def num_tokens(self) -> int:
        return self.input.shape[0]

    @property
    def mode(self) -> str:
        return "ptune" if self.deep is None else "deep_ptune"


def check_mode(tuning_mode: str | None, pre_seq_len: int | None) -> int:
    """The number of virtual tokens, 0 without tuning.

    Raises:
        ConfigurationError: there is no such mode, or the number is out of range.
    """
    if tuning_mode is None:
        if pre_seq_len:
            raise ConfigurationError(f"pre_seq_len needs a tuning_mode: {' or '.join(TUNING_MODES)}")
        return 0
    if tuning_mode not in TUNING_MODES:
        raise ConfigurationError(f"tuning_mode {tuning_mode!r} is none of {', '.join(TUNING_MODES)}")
    if tuning_mode == "lora":
        if pre_seq_len:
            raise ConfigurationError("tuning_mode='lora' has no prompts: leave out pre_seq_len")
        return 0
    num_tokens = DEFAULT_PROMPT_TOKENS if pre_seq_len is None else pre_seq_len
    if not 0 < num_tokens <= _MAX_PROMPT_TOKENS:
        raise ConfigurationError(f"pre_seq_len is {num_tokens}: choose 1 to {_MAX_PROMPT_TOKENS} virtual tokens")
    return num_tokens


def attach_prompts(
    owner: nn.Module,
    embeddings: Tensor,
    blocks: RemoteSequential,
    *,
    num_tokens: int,
    mode: str,
    hidden_size: int,
) -> None:
    """Give new prompts to the module that iterates over the blocks."""
    prompts = TunedPrompts(
        embeddings=embeddings,
        num_blocks=len(blocks),
        hidden_size=hidden_size,
        num_tokens=num_tokens,
        is_deep=mode == "deep_ptune",
    )
    owner.add_module(PROMPTS_ATTRIBUTE, prompts)


def prompts_of(owner: nn.Module) -> TunedPrompts | None:
    """The prompts of a module that iterates over the blocks, if it has any."""
    prompts = owner._modules.get(PROMPTS_ATTRIBUTE)
    return prompts if isinstance(prompts, TunedPrompts) else None


def freeze(model: nn.Module, base: nn.Module, stored: Callable[[str], bool]) -> None:
    """Freeze all weights but those outside of the base model that no checkpoint has: a new classifier trains."""
    inside = {id(weight) for weight in base.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) in inside or stored(name):
            weight.requires_grad_(False)


def add_prompts(owner: Any, original: Callable[..., Any], call: BaseCall, block_call: BlockCall) -> BlockCall:
    """Let a forward of ``owner`` begin with its prompts, if it has any and they are not in the session already.

    Changes the positions among ``call.arguments`` to those behind the prompts.
    """
    prompts = prompts_of(owner)
    if prompts is None:
        return block_call
    session = block_call.session
    has_positions = takes_position_ids(original)
    if has_positions:
        positions = call.position_ids
        if positions is None:
            past = 0 if session is None else session.position
            positions = torch.arange(past, past + call.width, device=owner.device)[None]
        call.arguments["position_ids"] = positions + prompts.num_tokens
    if session is not None and session.is_begun:
        return block_call
    dtype = owner.get_input_embeddings().weight.dtype
    entrance: list[Tensor] = []
    arguments: dict[str, Any] = {"inputs_embeds": prompts.input.to(dtype)[None], "use_cache": False}
    if has_positions:
        arguments["position_ids"] = torch.arange(prompts.num_tokens, device=owner.device)[None]
    with entered(BlockCall(blocks=block_call.blocks, session=None, valid=None, position_ids=None, entrance=entrance)):
        original(owner, **arguments)
    (states,) = entrance
    deep = None if prompts.deep is None else prompts.deep[:, None]
    return replace(block_call, prefix=Prefix(states=states[0], prompts=deep))
