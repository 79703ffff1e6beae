"""A swarm in this process: real servers, sockets and directory on the loopback device, with tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import petals_client
from petals_core.testing.factories import apply_caps, make_checkpoint
from petals_server.testing import InProcessSwarm

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny float32 checkpoint of six blocks, made once for each family, or the demo model's."""
    made: dict[str, Path] = {"demo": DEMO}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(tmp_path_factory.mktemp("models") / f"tiny-{family}", family, num_blocks=6)
        return made[family]

    return get


@pytest.fixture
def new_swarm() -> Iterator[Callable[..., InProcessSwarm]]:
    """Make an empty swarm that ends with the test."""
    made: list[InProcessSwarm] = []

    def make(**settings: Any) -> InProcessSwarm:
        made.append(InProcessSwarm(**settings))
        return made[-1]

    yield make
    for swarm in made:
        swarm.close()


@pytest.fixture(scope="session")
def shared_swarm(checkpoints: Callable[[str], Path]) -> Iterator[Callable[[str], InProcessSwarm]]:
    """Return a swarm of three servers of unequal spans for a family, for tests that leave it as it is."""
    made: dict[str, InProcessSwarm] = {}

    def get(family: str) -> InProcessSwarm:
        if family not in made:
            swarm = made[family] = InProcessSwarm()
            for start, end in ((0, 1), (1, 4), (4, 8 if family == "demo" else 6)):
                swarm.add(checkpoints(family), start, end, torch_dtype="float32")
        return made[family]

    yield get
    for swarm in made.values():
        swarm.close()


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model whose blocks are remote, and the same as Transformers loads it, both in float32."""

    model: Any
    local: Any
    folder: Path
    swarm: InProcessSwarm

    @property
    def both(self) -> tuple[Any, Any]:
        return self.model, self.local


@pytest.fixture(scope="session")
def pairs(
    shared_swarm: Callable[[str], InProcessSwarm], checkpoints: Callable[[str], Path]
) -> Iterator[Callable[..., Pair]]:
    """Return a family's pair, made once for each family and kind of model."""
    made: dict[tuple[str, str], Pair] = {}

    def get(family: str, kind: str = "ModelForCausalLM") -> Pair:
        if (family, kind) not in made:
            folder, swarm = checkpoints(family), shared_swarm(family)
            torch.manual_seed(0)  # for heads that the checkpoint lacks
            model = getattr(petals_client, f"AutoDistributed{kind}").from_pretrained(
                folder, initial_peers=swarm.initial_peers, dtype=torch.float32
            )
            local = apply_caps(getattr(transformers, f"Auto{kind}").from_pretrained(folder, dtype=torch.float32).eval())
            made[family, kind] = Pair(model=model, local=local, folder=folder, swarm=swarm)
        return made[family, kind]

    yield get
    for pair in made.values():
        pair.model.close()
