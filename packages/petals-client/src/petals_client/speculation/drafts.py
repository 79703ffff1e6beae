"""What the decoding loop asks for, and the rule by which it takes sampled drafts.

Letters: R rows, L columns so far, W drafted columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drafts:
    """Tokens that may come next: int64 [R, W]; W is 0 if there are none."""

    tokens: Tensor
    probabilities: Tensor | None = None
    """What they were sampled from, float32 [R, W, V]; None: they were not sampled."""


class Drafter(Protocol):
    """Where drafts come from. Asked before each trip but the first, and told what became of them."""

    def draft(self, tokens: Tensor, open_rows: Sequence[int], max_drafts: int) -> Drafts:
        """Draft what may follow tokens [R, L], pads included; what it says of rows that are not open doesn't matter."""

    def note(self, drafts: Drafts, open_rows: Sequence[int], tokens: Tensor, num_new: int, trip_s: float) -> None:
        """Be told of a trip, each but the first: tokens [R, L + num_new] stand there now."""


def no_drafts(tokens: Tensor) -> Drafts:
    """No drafts for tokens [R, L]."""
    return Drafts(tokens=tokens.new_empty(tokens.shape[0], 0))


def accept_or_resample(wanted: Tensor, drafted: Tensor, tokens: Tensor) -> Tensor:
    """Choose a token per row that is distributed as ``wanted`` [R, V], and the draft as often as that allows.

    ``tokens`` [R] were sampled from ``drafted`` [R, V]. A token is taken with the chance wanted / drafted, and else
    another one from what ``wanted`` has more of (Leviathan et al., "Fast Inference from Transformers via Speculative
    Decoding", 2023, section 2.3; Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling",
    2023, algorithm 2). What is refused is never the same token again.
    """
    index = tokens[:, None]
    ratio = (wanted.gather(1, index) / drafted.gather(1, index)).squeeze(1)
    is_taken = torch.rand(ratio.shape, device=ratio.device) < ratio
    if bool(is_taken.all()):
        return tokens
    left = (wanted - drafted).clamp_(min=0)
    left.scatter_(1, index, 0)
    # Nothing is left where both agree but for rounding; there a draft is refused only by rounding too.
    left = torch.where(left.sum(dim=1, keepdim=True) > 0, left, wanted)
    return torch.where(is_taken, tokens, torch.multinomial(left, num_samples=1).squeeze(1))
