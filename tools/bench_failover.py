"""How long a generation stalls when a server is gone: ``python3 tools/bench_failover.py [--json FILE]``.

Three server processes on loopback serve the bench model. A session reads a prompt and decodes; a fourth server comes,
which holds the middle blocks too, and the client hears of it; then the middle server is killed (SIGKILL) or stopped
(SIGSTOP), and the next step is timed. The stall is what that step takes beyond a normal one. It should be at most 0.3 s
and 1.5 times the time in which the lost span prefills the same tokens; where the server is only silent, the adaptive
deadline more: the wait without news after which the client asks all servers, and the time that these get to answer.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import local_swarm
from petals_client import AutoDistributedModelForCausalLM
from petals_client.patience import Patience
from petals_core.testing import factories

PROMPT_TOKENS = 512
STEPS_BEFORE = 30
STEPS_AFTER = 10
READY_TIMEOUT_S = 120.0
EDGES = local_swarm.spans(12, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """One failure, in seconds."""

    signal: str
    stall_s: float
    prefill_s: float
    """What the lost span had taken to compute the prompt."""
    deadline_s: float
    """Without news after which a silent server is given up; 0 where its connections are closed."""
    same_tokens: bool

    @property
    def bound_s(self) -> float:
        return self.deadline_s + 0.3 + 1.5 * self.prefill_s


@torch.inference_mode()
def measure(
    model: Any, victim: local_swarm.Process, number: signal.Signals, seed: int, start_other: Callable[[], None]
) -> Stall:
    """Fail ``victim``, which serves the middle of the chain, in a session, when another one has come."""
    prompt = torch.randint(3, 259, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(seed))
    tokens: list[list[int]] = []
    deadline_s = 0.0
    for fails in (True, False):  # the second time through who took its place
        tokens.append([])
        with model.inference_session(max_length=PROMPT_TOKENS + STEPS_BEFORE + STEPS_AFTER) as session:
            logits = model(prompt).logits
            for count in range(STEPS_BEFORE + STEPS_AFTER):
                if fails and count == STEPS_BEFORE // 2:
                    start_other()
                if fails and count == STEPS_BEFORE:
                    if number == signal.SIGSTOP:
                        remote = session._remote._session  # what it would wait is nobody else's business
                        deadline_s = remote.patience.wait_s(is_decode=True)
                        deadline_s += Patience.probe_s(max(hop.connection.rtt_s for hop in remote.hops))
                    os.kill(victim.pid, number)
                tokens[-1].append(int(logits[0, -1].argmax()))
                logits = model(torch.tensor([tokens[-1][-1:]])).logits
            if fails:
                steps = session.trace()
    decode_s = [step.total_s for step in steps[1:]]
    middle = steps[0].hops[1].peer_id
    return Stall(
        signal=number.name,
        stall_s=max(decode_s[STEPS_BEFORE:]) - statistics.median(decode_s[:STEPS_BEFORE]),
        prefill_s=sum(hop.compute_s for hop in steps[0].hops if hop.peer_id == middle),
        deadline_s=deadline_s,
        same_tokens=tokens[0] == tokens[1],
    )


def run(console: Console, folder: Path, num_runs: int) -> list[Stall]:
    stalls = []
    with local_swarm.LocalSwarm() as swarm:
        swarm.start_bootstrap()
        processes = [swarm.start_server(folder, start, end) for start, end in EDGES]
        for process in processes:
            process.wait_for(local_swarm.READY, READY_TIMEOUT_S)
        middle = processes[1]
        for count in range(num_runs):
            for number in (signal.SIGKILL, signal.SIGSTOP):
                console.print(f"{number.name}, run {count + 1}", style="dim")
                model = AutoDistributedModelForCausalLM.from_pretrained(
                    folder, initial_peers=[swarm.address], dtype=torch.float32
                )
                try:
                    others: list[local_swarm.Process] = []

                    def start_other(others: list[local_swarm.Process] = others, model: Any = model) -> None:
                        others.append(swarm.start_server(folder, *EDGES[1]))
                        others[0].wait_for(local_swarm.READY, READY_TIMEOUT_S)
                        model.remote_blocks.chain.run(lambda swarm: swarm.directory.refresh())  # as every 20 s anyway

                    stalls.append(measure(model, middle, number, count, start_other))
                finally:
                    model.close()
                os.kill(middle.pid, signal.SIGKILL)
                middle.popen.wait()
                (middle,) = others
    return stalls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--runs", type=int, default=3, help="failures of each kind (default: %(default)s)")
    options = parser.parse_args()
    logging.disable_progress_bar()
    console = Console(width=120)
    with local_swarm.stopping_in_order(), tempfile.TemporaryDirectory(prefix="petals-bench-") as temporary:
        os.environ["PETALS_CACHE_DIR"] = os.environ["PETALS_DATA_DIR"] = temporary
        stalls = run(console, factories.bench_model(Path(temporary, "bench")), options.runs)
    table = Table("failure", "stall", "at most", "prefill of the span", "adaptive deadline", "same tokens", "")
    met = True
    for each in stalls:
        is_met = each.stall_s <= each.bound_s and each.same_tokens
        met &= is_met
        table.add_row(
            each.signal,
            f"{each.stall_s:.2f} s",
            f"{each.bound_s:.2f} s",
            f"{each.prefill_s:.2f} s",
            f"{each.deadline_s:.2f} s" if each.deadline_s else "",
            "yes" if each.same_tokens else "no",
            "[green]met[/]" if is_met else "[red]missed[/]",
        )
    console.print(table)
    console.print(f"{os.cpu_count()} cores, {PROMPT_TOKENS} tokens of prompt, load {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in stalls], indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
