"""A tuning run whose servers are killed: ``python3 tools/tuning_failover.py [--steps 100] [--every 10]``.

Deep prompts of the demo model are trained for some steps by a swarm of processes, two servers for each half of the
model. In every tenth step one of the servers is killed with SIGKILL at a random moment of that step, and another one is
started. The same run with servers that are left alone is what its losses are compared with: none may differ by more
than 1e-4.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import local_swarm
from petals_client import AutoDistributedModelForCausalLM, ClientOptions

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
SPANS = ((0, 4), (0, 4), (4, 8), (4, 8))
READY_TIMEOUT_S = 120.0
TOLERANCE = 1e-4


class Servers:
    """The servers of a swarm, one of which is killed now and then."""

    def __init__(self, swarm: local_swarm.LocalSwarm, seed: int) -> None:
        self.num_killed = 0
        self._swarm = swarm
        self._chance = random.Random(seed)
        self._living = [self._start(span) for span in SPANS]
        self._timer: threading.Timer | None = None
        for process, _ in self._living:
            process.wait_for(local_swarm.READY, READY_TIMEOUT_S)

    def _start(self, span: tuple[int, int]) -> tuple[local_swarm.Process, tuple[int, int]]:
        return self._swarm.start_server(DEMO, *span, "--threads", "1"), span

    def kill_within(self, seconds: float) -> None:
        """Kill one at a random moment from now on; nobody is killed while another one is still starting."""
        self.settle()
        self._timer = threading.Timer(self._chance.uniform(0, seconds), self._kill)
        self._timer.start()

    def settle(self) -> None:
        """Wait until all servers serve."""
        if self._timer is not None:
            self._timer.join()
        for process, _ in self._living:
            process.wait_for(local_swarm.READY, READY_TIMEOUT_S)

    def _kill(self) -> None:
        process, span = self._living.pop(0)  # those of both halves take turns
        process.popen.kill()
        self.num_killed += 1
        self._living.append(self._start(span))


def tune(address: str, steps: int, disturb: Callable[[int, float], None]) -> list[float]:
    """Train deep prompts; ``disturb`` is told each step's number and the time that the last one took."""
    torch.manual_seed(0)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        DEMO,
        initial_peers=[],
        dtype=torch.float32,
        tuning_mode="deep_ptune",
        pre_seq_len=4,
        options=ClientOptions.make(initial_peers=address),
    )
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        took_s = 0.5
        for step in range(steps):
            disturb(step, took_s)
            started_s = time.monotonic()
            tokens = torch.randint(3, 2048, (4, 24), generator=torch.Generator().manual_seed(step % 8))
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            took_s = time.monotonic() - started_s
        return losses
    finally:
        model.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument(
        "--every", type=int, default=10, metavar="N", help="kill in every Nth step (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    longest_s = 0.0

    def disturb(step: int, took_s: float) -> None:
        nonlocal longest_s
        longest_s = max(longest_s, took_s)
        if step % options.every == options.every - 1:
            servers.kill_within(min(took_s, 2.0))

    with local_swarm.stopping_in_order(), tempfile.TemporaryDirectory(prefix="petals-tuning-") as temporary:
        os.environ["PETALS_CACHE_DIR"] = os.environ["PETALS_DATA_DIR"] = temporary
        with local_swarm.LocalSwarm() as swarm:
            swarm.start_bootstrap()
            servers = Servers(swarm, options.seed)
            undisturbed = tune(swarm.address, options.steps, lambda step, took_s: None)
            disturbed = tune(swarm.address, options.steps, disturb)
            servers.settle()
    worst = max(abs(a - b) for a, b in zip(disturbed, undisturbed, strict=True))
    print(
        f"{options.steps} steps, {servers.num_killed} servers killed: loss {undisturbed[0]:.4f} to "
        f"{undisturbed[-1]:.4f}, the curves differ by at most {worst:.1e}; the longest step took {longest_s:.1f} s"
    )
    is_met = worst <= TOLERANCE and servers.num_killed == options.steps // options.every
    return 0 if is_met and undisturbed[-1] < undisturbed[0] else 1


if __name__ == "__main__":
    sys.exit(main())
