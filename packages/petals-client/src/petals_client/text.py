"""Pieces of text from tokens as they come, and stopping on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer


class PieceStreamer(TextStreamer):
    """Hands each piece of new text (not of the prompt) to a function, as soon as it can't change any more."""

    def __init__(self, tokenizer: Any, put: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._put = put

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._put(text)


class StopWhen(StoppingCriteria):
    """Ends a generation at the next token when a condition has become true."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._condition(), device=input_ids.device)
