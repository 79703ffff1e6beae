"""Clients that train different things on the same servers at once get what each gets alone; others go on decoding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from petals_client import AutoDistributedModelForCausalLM
from petals_server.testing import InProcessSwarm

STEPS = 2
KINDS: tuple[dict[str, Any], ...] = (
    {"tuning_mode": "ptune", "pre_seq_len": 3},
    {"tuning_mode": "deep_ptune", "pre_seq_len": 2},
    {"tuning_mode": "lora", "lora_rank": 2},
    {"tuning_mode": "lora", "lora_rank": 4, "target_modules": ["q_proj", "down_proj"]},
    {"tuning_mode": "deep_ptune", "pre_seq_len": 4},
)
NUM_TUNERS = 10


@pytest.fixture
def swarm(new_swarm: Any, checkpoints: Callable[[str], Path]) -> InProcessSwarm:
    """Two servers of all blocks together."""
    made: InProcessSwarm = new_swarm()
    for start, end in ((0, 3), (3, 6)):
        made.add(checkpoints("llama"), start, end)
    return made


@pytest.fixture
def load(swarm: InProcessSwarm, checkpoints: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """A client of its own identity."""
    models: list[Any] = []

    def make(seed: int = 0, **options: Any) -> Any:
        torch.manual_seed(seed)
        folder = checkpoints("llama")
        models.append(
            AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=swarm.initial_peers, **options)
        )
        return models[-1]

    yield make
    for model in models:
        model.close()


def batch(seed: int) -> Tensor:
    return torch.randint(3, 259, (2, 8), generator=torch.Generator().manual_seed(seed))


def tune(model: Any, seed: int) -> list[float]:
    """Some steps; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    inputs = batch(100 * seed)
    for _ in range(STEPS):
        loss = model(input_ids=inputs, labels=inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_tuners_beside_each_other_and_beside_inference(
    swarm: InProcessSwarm, load: Callable[..., Any], checkpoints: Callable[[str], Path]
) -> None:
    models = [load(seed, **KINDS[seed % len(KINDS)]) for seed in range(NUM_TUNERS)]
    first = [[weight.detach().clone() for weight in model.parameters()] for model in models]
    alone = [tune(model, seed) for seed, model in enumerate(models)]
    for model, values in zip(models, first, strict=True):
        for weight, value in zip(model.parameters(), values, strict=True):
            weight.data.copy_(value)
    user = load()
    together: dict[int, list[float]] = {}
    tokens: list[Tensor] = []
    is_over = threading.Event()

    def run(seed: int) -> None:
        together[seed] = tune(models[seed], seed)

    def decode() -> None:
        while not is_over.is_set():
            tokens.append(user.generate(batch(7), max_new_tokens=8, min_new_tokens=8, do_sample=False))

    tuners = [threading.Thread(target=run, args=(seed,)) for seed in range(NUM_TUNERS)]
    decoder = threading.Thread(target=decode)
    for thread in (decoder, *tuners):
        thread.start()
    for thread in tuners:
        thread.join()
    is_over.set()
    decoder.join()
    assert together.keys() == set(range(NUM_TUNERS))
    for seed, losses in enumerate(alone):
        assert together[seed] == pytest.approx(losses, rel=1e-4)
        assert losses[1] != losses[0]
    local = AutoModelForCausalLM.from_pretrained(checkpoints("llama")).eval()
    expected = local.generate(batch(7), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokens
    assert all(torch.equal(each, expected) for each in tokens)
    for server in swarm.servers:
        training = server.holding.handler.training
        assert training.graphs.num_bytes <= training.graphs.budget_bytes
