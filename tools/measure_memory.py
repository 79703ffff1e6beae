"""How much memory a server and a client take above their weights: ``python3 tools/measure_memory.py``.

Proportional memory (Linux's PSS) after one forward of one token with the bench model, less that of a process that only
imported the package; both run at the same time, so that they share the same pages.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from local_swarm import READY, LocalSwarm, stopping_in_order
from petals_core.testing import factories
from proportional_memory import CLIENT_IMPORTS, SERVER_IMPORTS, family, pss_bytes

MIB = 1 << 20
FACTOR = 1.15
SERVER_EXTRA_BYTES = 32 * MIB
CLIENT_EXTRA_BYTES = 48 * MIB
TIMEOUT_S = 120.0
CLIENT = """
import torch
from petals_client import AutoDistributedModelForCausalLM
model = AutoDistributedModelForCausalLM.from_pretrained(
    {folder!r}, initial_peers=[{address!r}], torch_dtype=torch.float32
)
with torch.inference_mode():
    model(torch.tensor([[5]]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process takes above its imports, and what it may take."""

    name: str
    above_imports_bytes: int
    tensor_bytes: int
    extra_bytes: int

    @property
    def allowed_bytes(self) -> int:
        return int(FACTOR * self.tensor_bytes) + self.extra_bytes

    @property
    def is_met(self) -> bool:
        return self.above_imports_bytes <= self.allowed_bytes


def tensor_bytes(folder: Path) -> tuple[int, int]:
    """Size of the model's blocks, and of everything else in it, in float32."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    blocks = sum(weight.nbytes for weight in model.model.layers.parameters())
    return blocks, sum(weight.nbytes for weight in model.parameters()) - blocks


def measure(folder: Path) -> list[Usage]:
    """Run one server of all blocks and one client, and compare each with a process that only imported its package."""
    blocks, rest = tensor_bytes(folder)
    with LocalSwarm() as swarm:
        swarm.start_bootstrap()
        server = swarm.start_server(folder, 0, AutoConfig.from_pretrained(folder).num_hidden_layers)
        server.wait_for(READY, TIMEOUT_S)
        client = swarm.start_baseline(CLIENT.format(folder=str(folder), address=swarm.address))
        server_imports, client_imports = swarm.start_baseline(SERVER_IMPORTS), swarm.start_baseline(CLIENT_IMPORTS)
        used = {
            process: sum(pss_bytes(pid) for pid in family(process.pid))
            for process in (server, client, server_imports, client_imports)
        }
    return [
        Usage(
            name="server of all blocks",
            above_imports_bytes=used[server] - used[server_imports],
            tensor_bytes=blocks,
            extra_bytes=SERVER_EXTRA_BYTES,
        ),
        Usage(
            name="client",
            above_imports_bytes=used[client] - used[client_imports],
            tensor_bytes=rest,
            extra_bytes=CLIENT_EXTRA_BYTES,
        ),
    ]


def main() -> int:
    with stopping_in_order(), tempfile.TemporaryDirectory(prefix="petals-bench-") as temporary:
        os.environ["PETALS_CACHE_DIR"] = temporary
        usages = measure(factories.bench_model(Path(temporary, "bench")))
    table = Table(
        "process", "above imports", "tensors", "allowed", "", title="Memory after one token, bench model, MiB"
    )
    for usage in usages:
        numbers = (usage.above_imports_bytes, usage.tensor_bytes, usage.allowed_bytes)
        verdict = "[green]met[/]" if usage.is_met else "[red]missed[/]"
        table.add_row(usage.name, *(f"{number / MIB:.0f}" for number in numbers), verdict)
    Console().print(table)
    return 0 if all(usage.is_met for usage in usages) else 1


if __name__ == "__main__":
    sys.exit(main())
