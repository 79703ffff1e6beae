"""What the simulated servers are made of.

Memory, bandwidth and dense half-precision tensor throughput are of NVIDIA's data sheets (for GeForce cards, of the
architecture white papers). The mix, the uplinks and the distances are assumptions, chosen to be like volunteers' homes
and some labs.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from petals_server.placement.offers import Ability


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One model of card."""

    name: str
    memory_gb: float
    bandwidth_gb_per_s: float
    tflops: float
    """Dense, half precision, tensor cores where there are any."""
    weight: float
    """Share of the servers."""
    is_lab: bool = False
    """It stands in a data centre."""


GPUS: Final = (
    Gpu(name="GTX 1080 Ti", memory_gb=11, bandwidth_gb_per_s=484, tflops=11.3, weight=4),
    Gpu(name="RTX 2080 Ti", memory_gb=11, bandwidth_gb_per_s=616, tflops=108, weight=6),
    Gpu(name="RTX 3060", memory_gb=12, bandwidth_gb_per_s=360, tflops=51, weight=14),
    Gpu(name="RTX 3080", memory_gb=10, bandwidth_gb_per_s=760, tflops=119, weight=8),
    Gpu(name="RTX 3090", memory_gb=24, bandwidth_gb_per_s=936, tflops=142, weight=18),
    Gpu(name="RTX 4060 Ti 16 GB", memory_gb=16, bandwidth_gb_per_s=288, tflops=88, weight=8),
    Gpu(name="RTX 4080", memory_gb=16, bandwidth_gb_per_s=717, tflops=195, weight=8),
    Gpu(name="RTX 4090", memory_gb=24, bandwidth_gb_per_s=1008, tflops=330, weight=16),
    Gpu(name="RTX A6000", memory_gb=48, bandwidth_gb_per_s=768, tflops=155, weight=4, is_lab=True),
    Gpu(name="T4", memory_gb=16, bandwidth_gb_per_s=320, tflops=65, weight=5, is_lab=True),
    Gpu(name="L40S", memory_gb=48, bandwidth_gb_per_s=864, tflops=362, weight=3, is_lab=True),
    Gpu(name="A100 40 GB", memory_gb=40, bandwidth_gb_per_s=1555, tflops=312, weight=4, is_lab=True),
    Gpu(name="H100 SXM", memory_gb=80, bandwidth_gb_per_s=3350, tflops=989, weight=2, is_lab=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The model that the swarm serves."""

    num_blocks: int
    block_parameters: float
    hidden_size: int
    block_gb: float
    """Of one block in nf4."""


MODELS: Final = {
    80: ModelSize(num_blocks=80, block_parameters=0.86e9, hidden_size=8192, block_gb=0.46),
    126: ModelSize(num_blocks=126, block_parameters=3.2e9, hidden_size=16384, block_gb=1.7),
}
"""As in Llama 3.1 with 70 and 405 billion parameters."""


def model_of(num_blocks: int) -> ModelSize:
    """A model of so many blocks: a known one, or one with the blocks of the smaller known one."""
    known = MODELS.get(num_blocks)
    if known is not None:
        return known
    small = MODELS[80]
    return ModelSize(
        num_blocks=num_blocks,
        block_parameters=small.block_parameters,
        hidden_size=small.hidden_size,
        block_gb=small.block_gb,
    )


_MEMORY_SHARE: Final = 0.75
"""For weights; the rest is for the attention cache and everything else."""
_EFFICIENCY: Final = 0.5
"""Of bandwidth and of arithmetic, that is reached."""
_BATCH: Final = 8
"""Sessions whose decode steps share one pass over the weights."""
_REGIONS: Final = ((0.0, 0.0), (0.045, 0.0), (0.02, 0.075))
"""Where people live, as points whose distances are one-way delays in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One server's hardware and line."""

    gpu: str
    ability: Ability
    """Truly; what it announces may differ."""
    block_s: float
    """For one block of one decode step."""
    load_gb_per_s: float
    """At which new blocks come: its downlink or its disk."""
    place: tuple[float, float]
    access_s: float
    """One-way delay of its line."""

    def round_trip_s(self, place: tuple[float, float], access_s: float) -> float:
        """To somebody else."""
        return 2 * (math.dist(self.place, place) + self.access_s + access_s)


def draw_place(rng: random.Random) -> tuple[tuple[float, float], float]:
    """Somewhere, and the delay of the line there."""
    x, y = rng.choices(_REGIONS, weights=(4, 4, 2))[0]
    return (x + rng.gauss(0, 0.008), y + rng.gauss(0, 0.008)), rng.lognormvariate(math.log(0.006), 0.6)


def draw_machine(rng: random.Random, model: ModelSize) -> Machine:
    """A server as they come."""
    gpu = rng.choices(GPUS, weights=[each.weight for each in GPUS])[0]
    num_blocks = max(1, min(model.num_blocks, int(gpu.memory_gb * _MEMORY_SHARE / model.block_gb)))
    passes_per_s = _EFFICIENCY * gpu.bandwidth_gb_per_s / model.block_gb
    arithmetic_per_s = _EFFICIENCY * gpu.tflops * 1e12 / (2 * model.block_parameters)
    if gpu.is_lab:
        up_mbit, down_mbit = 1000.0, 2000.0
    else:
        up_mbit = min(1000.0, rng.lognormvariate(math.log(40), 0.8))
        down_mbit = min(2000.0, max(up_mbit, rng.lognormvariate(math.log(250), 0.7)))
    sent_per_s = up_mbit * 1e6 / 8 / (2 * model.hidden_size * 1.05)
    place, access_s = draw_place(rng)
    return Machine(
        gpu=gpu.name,
        ability=Ability(
            max_blocks=num_blocks,
            block_tokens_per_s=min(_BATCH * passes_per_s, arithmetic_per_s),
            link_tokens_per_s=sent_per_s,
        ),
        block_s=1 / passes_per_s,
        load_gb_per_s=down_mbit / 8000,
        place=place,
        access_s=access_s,
    )
