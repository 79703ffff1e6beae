"""Measure a model as a user meets it: whole documents from their begin token on, each token after all before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_model.tokenizer import MAX_POSITIONS

Tokens = npt.NDArray[np.int64]

BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A piece of a document as the model sees it; only the tokens from ``first_scored`` on are counted."""

    tokens: Tokens
    first_scored: int


def windows(document: Tokens) -> Iterator[Window]:
    """Yield overlapping windows that score each token after the first exactly once, the later ones on half a window."""
    stride = MAX_POSITIONS // 2
    yield Window(tokens=document[: MAX_POSITIONS + 1], first_scored=1)
    for scored in range(MAX_POSITIONS + 1, len(document), stride):
        start = scored - stride - 1
        yield Window(tokens=document[start : scored + stride], first_scored=scored - start)


def batches(found: Sequence[Window]) -> Iterator[Sequence[Window]]:
    """Yield the windows in groups of similar length."""
    batch: list[Window] = []
    for window in sorted(found, key=lambda window: -len(window.tokens)):
        if batch and len(batch[0].tokens) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def batch_bits(model: LlamaForCausalLM, batch: Sequence[Window]) -> float:
    """Return what the scored tokens of a group of windows, longest first, cost together in bits."""
    tokens = torch.zeros(len(batch), len(batch[0].tokens), dtype=torch.int64)
    scored = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, window in enumerate(batch):
        tokens[row, : len(window.tokens)] = torch.from_numpy(window.tokens)
        scored[row, window.first_scored : len(window.tokens)] = True
    # Windows are filled up at their end, which causal attention never lets the earlier tokens see.
    logits = model(tokens[:, :-1].contiguous(), use_cache=False).logits[scored[:, 1:]]
    nats = torch.nn.functional.cross_entropy(logits.float(), tokens[scored], reduction="none")
    return float(nats.double().sum()) / float(np.log(2))


def model_bits(model: LlamaForCausalLM, documents: Sequence[Tokens]) -> float:
    """Return what documents cost in bits after their first token, which every document has alike."""
    training = model.training
    model.train(False)
    found = [window for document in documents for window in windows(document)]
    bits = sum(batch_bits(model, batch) for batch in batches(found))
    model.train(training)
    return bits


def continuation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, *, num_tokens: int) -> str:
    """Return a prompt with the model's greedy continuation, up to the end token."""
    training = model.training
    model.train(False)
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = model.generate(  # type: ignore[misc]
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=num_tokens
    )
    model.train(training)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
