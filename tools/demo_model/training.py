"""Train the model: documents packed into rows, longer rows towards the end, a learning rate that falls to zero."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_model.optimizer import Optimizer
from demo_model.team import Team
from demo_model.tokenizer import MAX_POSITIONS

Tokens = npt.NDArray[np.int64]

# What one member of a team computes on in a step.
BATCH_TOKENS = 2048
WARMUP_STEPS = 50
STEPS_PER_STATE = 100
DECAY_FROM = 0.3
# The length of a row from each share of the training on.
ROW_TOKENS = ((0.0, 256), (0.75, 512), (0.92, MAX_POSITIONS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When training ends: after a number of steps or of seconds, whichever is first."""

    num_steps: int
    duration_s: float | None

    def progress(self, step: int, elapsed_s: float) -> float:
        """Return the share of the budget that is spent, at most 1."""
        spent_s = elapsed_s / self.duration_s if self.duration_s else 0.0
        return min(1.0, max(step / self.num_steps, spent_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Where the training stands after a step; ``loss`` is in nats per token, averaged over recent steps."""

    step: int
    progress: float
    loss: float


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """Return an untrained model of eight blocks for the tokenizer's tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learning_scale(step: int, progress: float) -> float:
    """Return the factor on the learning rates: a short warm-up, level, then straight down to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (1 - progress) / (1 - DECAY_FROM))


def row_tokens(progress: float) -> int:
    """Return how many tokens a row has at a share of the training."""
    return max(length for start, length in ROW_TOKENS if progress >= start)


class Rows:
    """An endless stream of documents in random order, cut into batches of rows."""

    def __init__(self, documents: Sequence[Tokens], *seeds: int) -> None:
        """Shuffle the documents; the same seeds give the same stream."""
        self._documents = documents
        self._random = np.random.default_rng(seeds)
        self._rest: Tokens = np.zeros(0, dtype=np.int64)

    def batch(self, length: int) -> Tensor:
        """Return the next rows, [BATCH_TOKENS / length, length + 1]: each token is followed by the one to predict."""
        num_rows = BATCH_TOKENS // length
        while len(self._rest) < num_rows * (length + 1):
            order = self._random.permutation(len(self._documents))
            self._rest = np.concatenate([self._rest, *(self._documents[index] for index in order)])
        taken, self._rest = np.split(self._rest, [num_rows * (length + 1)])
        return torch.from_numpy(taken.reshape(num_rows, length + 1).copy())


def row_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Return the mean loss of predicting each row's tokens after its first, in nats per token."""
    logits = model(rows[:, :-1].contiguous(), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(
    model: LlamaForCausalLM, documents: Sequence[Tokens], budget: Budget, team: Team, *, seed: int, state: Path | None
) -> Iterator[Report]:
    """Train a model in place, yielding a report after every step; stop asking for reports to stop early.

    With ``state`` training goes on from what ``save_state`` wrote there, if anything. A resumed run sees the documents
    in a new order.
    """
    model.train()
    optimizer = Optimizer(dict(model.named_parameters()))
    first_step, earlier_s = load_state(state, model, optimizer) if state and state.exists() else (0, 0.0)
    rows = Rows(documents, seed, first_step, team.rank)
    started, loss_sum, weight = time.monotonic() - earlier_s, 0.0, 0.0
    for step in range(first_step, budget.num_steps):
        progress = team.agree(budget.progress(step, time.monotonic() - started))
        if progress >= 1:
            break
        loss = row_loss(model, rows.batch(row_tokens(progress)))
        loss.backward()
        team.average(model.parameters())
        optimizer.update(step=step, scale=learning_scale(step, progress))
        loss_sum, weight = 0.98 * loss_sum + loss.item(), 0.98 * weight + 1
        if state and team.rank == 0 and (step + 1) % STEPS_PER_STATE == 0:
            save_state(state, model, optimizer, step=step + 1, elapsed_s=time.monotonic() - started)
        yield Report(step=step + 1, progress=progress, loss=loss_sum / weight)


def save_state(path: Path, model: LlamaForCausalLM, optimizer: Optimizer, *, step: int, elapsed_s: float) -> None:
    """Write all that training needs to go on: weights and optimizer state in float32, and where it stood."""
    tensors = {f"weights.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | optimizer.state, path, {"step": str(step), "elapsed_s": str(elapsed_s)})


def load_state(path: Path, model: LlamaForCausalLM, optimizer: Optimizer) -> tuple[int, float]:
    """Fill the model and the optimizer from a file; return the steps and seconds of training behind it.

    Raises:
        RuntimeError: the file is of a model of another shape.
    """
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    targets = {f"weights.{name}": parameter for name, parameter in parameters.items()} | optimizer.state
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, target in targets.items():
            target.copy_(file.get_tensor(name))
        metadata = file.metadata()
    return int(metadata["step"]), float(metadata["elapsed_s"])
