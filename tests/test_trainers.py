"""``transformers.Trainer`` and ``accelerate`` train what a distributed model has to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from petals_client import AutoDistributedModelForCausalLM


@pytest.fixture
def load(shared_swarm: Any, checkpoints: Callable[[str], Path]) -> Iterator[Callable[[], Any]]:
    """Load the tiny llama with fresh prompts, the same each time."""
    models: list[Any] = []

    def make() -> Any:
        torch.manual_seed(0)
        models.append(
            AutoDistributedModelForCausalLM.from_pretrained(
                checkpoints("llama"),
                initial_peers=shared_swarm("llama").initial_peers,
                tuning_mode="deep_ptune",
                pre_seq_len=2,
            )
        )
        return models[-1]

    yield make
    for model in models:
        model.close()


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    tokens = torch.randint(3, 259, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def plain_loop(model: Any, batches: list[Tensor], accumulate: int = 1) -> list[float]:
    """What the trainers are compared with."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        loss = model(input_ids=batch, labels=batch).loss
        losses.append(float(loss.detach()))
        (loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_steps": 2,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(output_dir=str(folder), **settings | changes)


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_and_resuming(load: Callable[[], Any], tmp_path: Path) -> None:
    model = load()
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    batches = [torch.stack([row["input_ids"] for row in rows()[i : i + 2]]) for i in range(0, 8, 2)]
    assert losses_of(trainer) == pytest.approx(plain_loop(load(), batches), rel=1e-3)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    # A client that was restarted goes on from its last checkpoint.
    again = Trainer(model=load(), args=arguments(tmp_path), train_dataset=rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(again)[2:] == pytest.approx(losses_of(trainer)[2:], rel=1e-4)
    for actual, expected in zip(again.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(actual, expected, atol=1e-5)


def test_accelerate_with_gradient_accumulation(load: Callable[[], Any]) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    data = torch.utils.data.DataLoader(rows(), batch_size=2)  # type: ignore[arg-type]
    prepared, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for batch in data:
        with accelerator.accumulate(prepared):
            loss = prepared(**batch).loss
            losses.append(float(loss.detach()))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    batches = [torch.stack([row["input_ids"] for row in rows()[i : i + 2]]) for i in range(0, 8, 2)]
    assert losses == pytest.approx(plain_loop(load(), batches, accumulate=2), rel=1e-5)
    assert losses[-1] != losses[0]
