"""What the software of a hop costs: ``python3 tools/bench_hop.py [--json FILE]``.

A chain of k servers, separate processes on the loopback interface with TLS as always, computes one token at a time for
a client in this process; the same Transformers model computes the same token here. Steps alternate, so that both see
the same machine: the cost of a hop is (step through k servers - local step) / k. The thin model has wide hidden states
and next to no computation, so that what is left is software; the bench model shows what share of the local speed stays.
"""

from __future__ import annotations

import os

import environment

if __name__ == "__main__":
    environment.enter()
    # The local model's threads would spin for a while after each of its steps, and take a core from the servers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import local_swarm
import proportional_memory
from petals_client import AutoDistributedModelForCausalLM
from petals_core.testing import factories

MODELS = {"thin": factories.thin_model, "bench": factories.bench_model}
PROMPT_TOKENS = 16
WARM_UP_STEPS = 20
MAX_HOP_S = 0.0007
MIN_DECODE_RATIO = 0.9
MAX_LINES = 12
MAX_EXTRA_BYTES = 256 << 20
MAX_EXTRA_IMPORT_S = 0.3
READY_TIMEOUT_S = 120.0
LOADING = re.compile(r" loading blocks ")
LOADED = re.compile(r" computing with (\d+) thread")
COLD_START = """
import sys, time
started_s = time.perf_counter()
import torch
from transformers import LlamaForCausalLM
theirs_s = time.perf_counter() - started_s
from petals_client import AutoDistributedModelForCausalLM
import petals_client.generation, petals_client.swarm_chain  # what the class brings in when it is used
import_s = time.perf_counter() - started_s
folder, address = sys.argv[1:]
model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[address], torch_dtype=torch.float32)
model.generate(torch.arange(3, 19).unsqueeze(0), attention_mask=torch.ones(1, 16, dtype=torch.long), max_new_tokens=1)
print(import_s, import_s - theirs_s)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A sample's median and quartiles, in seconds."""

    median_s: float
    quartiles_s: tuple[float, float]
    count: int

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(sample, n=4)
        return cls(median_s=median, quartiles_s=(low, high), count=len(sample))

    def __str__(self) -> str:
        low, high = self.quartiles_s
        return f"{1e3 * self.median_s:.2f} ms ({1e3 * low:.2f} to {1e3 * high:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFigures:
    """What one server process takes."""

    num_processes: int
    extra_bytes: int
    """Proportional memory above a process with the same imports and above the weights."""
    start_s: float
    """From the command to the ready line, without the loading of weights."""
    num_lines: int
    num_threads: int
    """With which it computes a step of one token; it measured that itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopFigures:
    """One model through a number of servers."""

    model: str
    num_servers: int
    hop: Spread
    local_step: Spread
    remote_step: Spread
    decode_ratio: float
    """Tokens per second through the servers over those of the local model, both with generate."""
    same_tokens: bool
    servers: tuple[ServerFigures, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """A new client process up to its first token, medians in seconds."""

    total_s: float
    import_s: float
    extra_import_s: float
    """What comes after ``import torch; from transformers import LlamaForCausalLM``."""


# --- steps ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_steps(remote: Any, local: Any, num_pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of decode steps through the servers and of the same steps here, in turns, with equally long caches."""
    prompt = torch.arange(3, 3 + PROMPT_TOKENS).unsqueeze(0)
    cache = local(prompt, use_cache=True).past_key_values
    remote_s, local_s = [], []
    with remote.inference_session(max_length=PROMPT_TOKENS + WARM_UP_STEPS + num_pairs):
        remote(prompt)
        for number in range(WARM_UP_STEPS + num_pairs):
            token = torch.tensor([[3 + number % 256]])
            theirs_s = timed(lambda: remote(token))  # noqa: B023 - called at once
            ours_s = timed(lambda: local(token, past_key_values=cache, use_cache=True))  # noqa: B023
            if number >= WARM_UP_STEPS:
                remote_s.append(theirs_s)
                local_s.append(ours_s)
    return remote_s, local_s


def measure_decoding(remote: Any, local: Any, num_tokens: int, num_runs: int) -> tuple[float, bool]:
    """Rate of ``generate`` through servers over the local rate (median of runs in turns), and if tokens agree."""
    prompt = torch.arange(3, 3 + PROMPT_TOKENS).unsqueeze(0)
    ratios, same = [], True
    for _ in range(num_runs):
        remote_rate, remote_ids = decode(remote, prompt, num_tokens, speculation="off")
        local_rate, local_ids = decode(local, prompt, num_tokens)
        ratios.append(remote_rate / local_rate)
        same &= bool(torch.equal(remote_ids, local_ids))
    return statistics.median(ratios), same


class Clock(BaseStreamer):
    """Notes when each token came; the prompt comes first."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: object) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(model: Any, prompt: torch.Tensor, num_tokens: int, **options: Any) -> tuple[float, torch.Tensor]:
    """Tokens per second after the first token, and all tokens."""
    clock = Clock()
    token_ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        streamer=clock,
        **options,
    )
    return (num_tokens - 1) / (clock.times_s[-1] - clock.times_s[1]), token_ids


def timed(action: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


# --- processes --------------------------------------------------------------------------------------------------------


def server_figures(
    process: local_swarm.Process, ready: local_swarm.Line, baseline_bytes: int, weights: int
) -> ServerFigures:
    """What a server took to start and takes to run."""
    members = proportional_memory.family(process.pid)
    loaded, threads = process.wait_for(LOADED, 1)
    loading_s = loaded.time_s - process.wait_for(LOADING, 1)[0].time_s
    return ServerFigures(
        num_processes=len(members),
        extra_bytes=sum(proportional_memory.pss_bytes(pid) for pid in members) - baseline_bytes - weights,
        start_s=ready.time_s - process.started_s - loading_s,
        num_lines=sum(line.time_s <= ready.time_s for line in process.lines),
        num_threads=int(threads[1]),
    )


def run_servers(
    console: Console, name: str, folder: Path, num_servers: int, local: Any, options: argparse.Namespace
) -> HopFigures:
    """Start a chain of servers for one model and measure it."""
    with local_swarm.LocalSwarm() as swarm:
        swarm.start_bootstrap()
        baseline = swarm.start_baseline(proportional_memory.SERVER_IMPORTS)
        edges = local_swarm.spans(local.config.num_hidden_layers, num_servers)
        processes = [swarm.start_server(folder, start, end) for start, end in edges]
        ready = [process.wait_for(local_swarm.READY, READY_TIMEOUT_S)[0] for process in processes]
        remote = AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=[swarm.address], torch_dtype=torch.float32
        )
        try:
            console.print(f"  {num_servers} servers: decode steps", style="dim")
            remote_s, local_s = measure_steps(remote, local, options.pairs)
            console.print(f"  {num_servers} servers: generate", style="dim")
            ratio, same = measure_decoding(remote, local, options.tokens, options.runs)
        finally:
            remote.close()
        baseline_bytes = proportional_memory.pss_bytes(baseline.pid)
        weights = [span_bytes(local, start, end) for start, end in edges]
        servers = [
            server_figures(process, line, baseline_bytes, size)
            for process, line, size in zip(processes, ready, weights, strict=True)
        ]
    return HopFigures(
        model=name,
        num_servers=num_servers,
        hop=Spread.of([(theirs - ours) / num_servers for theirs, ours in zip(remote_s, local_s, strict=True)]),
        local_step=Spread.of(local_s),
        remote_step=Spread.of(remote_s),
        decode_ratio=ratio,
        same_tokens=same,
        servers=tuple(servers),
    )


def span_bytes(local: Any, start: int, end: int) -> int:
    """Size of the weights of blocks ``start:end``."""
    return sum(weight.nbytes for block in local.model.layers[start:end] for weight in block.parameters())


def cold_start(folder: Path, num_runs: int) -> ColdStart:
    """Time new client processes up to the first token."""
    samples = []
    with local_swarm.LocalSwarm() as swarm:
        swarm.start_bootstrap()
        process = swarm.start_server(folder, 0, 12)
        process.wait_for(local_swarm.READY, READY_TIMEOUT_S)
        for _ in range(1 + num_runs):
            started_s = time.perf_counter()
            printed = run_python(COLD_START, str(folder), swarm.address)
            samples.append((time.perf_counter() - started_s, *map(float, printed.split())))
    # The first run may compile, as installing the packages does.
    total_s, import_s, extra_import_s = map(statistics.median, zip(*samples[1:], strict=True))
    return ColdStart(total_s=total_s, import_s=import_s, extra_import_s=extra_import_s)


def run_python(code: str, *arguments: str) -> str:
    """Run a program in a process of its own, which may keep what it compiles, and return what it prints."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, env=environ)


# --- report -----------------------------------------------------------------------------------------------------------


def report(console: Console, hops: Sequence[HopFigures], start: ColdStart) -> bool:
    """Print the figures beside their targets; True if all are met."""
    table = Table("figure", "model", "servers", "measured", "target", "", title="Software cost of a hop")
    checks: list[bool] = []

    def row(figure: str, model: str, servers: str, measured: str, target: str, met: bool | None) -> None:
        verdict = "" if met is None else "[green]met[/]" if met else "[red]missed[/]"
        table.add_row(figure, model, servers, measured, target, verdict)
        if met is not None:
            checks.append(met)

    for figures in hops:
        where = (figures.model, str(figures.num_servers))
        thin = figures.model == "thin"
        met = figures.hop.median_s <= MAX_HOP_S if thin else None
        row("added per hop", *where, str(figures.hop), f"{1e3 * MAX_HOP_S:.1f} ms" if thin else "", met)
        row("step through servers", *where, str(figures.remote_step), "", None)
        row("step locally", *where, str(figures.local_step), "", None)
        judged = not thin and figures.num_servers == 3
        met = figures.decode_ratio >= MIN_DECODE_RATIO if judged else None
        row(
            "decoding, share of local",
            *where,
            f"{figures.decode_ratio:.2f}",
            f"{MIN_DECODE_RATIO}" if judged else "",
            met,
        )
        row("same tokens as local", *where, "yes" if figures.same_tokens else "no", "yes", figures.same_tokens)
    for figures in hops:
        where = (figures.model, str(figures.num_servers))
        row(
            "threads of each server", *where, ", ".join(str(server.num_threads) for server in figures.servers), "", None
        )
        most = max(server.num_processes for server in figures.servers)
        row("processes of a server", *where, str(most), "1", most == 1)
        extra = max(server.extra_bytes for server in figures.servers)
        row("memory above imports and weights", *where, f"{extra / 2**20:.0f} MiB", "256 MiB", extra <= MAX_EXTRA_BYTES)
        seconds = statistics.median(server.start_s for server in figures.servers)
        row("start to ready without loading", *where, f"{seconds:.1f} s", "", None)
        lines = max(server.num_lines for server in figures.servers)
        row("lines until ready", *where, str(lines), str(MAX_LINES), lines <= MAX_LINES)
    row("client's cold start to first token", hops[-1].model, "1", f"{start.total_s:.1f} s", "", None)
    row("of which imports", "", "", f"{start.import_s:.2f} s", "", None)
    row(
        "imports above Transformers' own",
        "",
        "",
        f"{start.extra_import_s:.2f} s",
        f"{MAX_EXTRA_IMPORT_S} s",
        start.extra_import_s <= MAX_EXTRA_IMPORT_S,
    )
    console.print(table)
    return all(checks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of steps to time (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a generate (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="generations and cold starts (default: %(default)s)")
    parser.add_argument("--hops", type=int, nargs="+", default=[1, 3], help="numbers of servers (default: 1 3)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    options = parser.parse_args()
    logging.disable_progress_bar()
    console = Console()
    hops: list[HopFigures] = []
    with local_swarm.stopping_in_order(), tempfile.TemporaryDirectory(prefix="petals-bench-") as temporary:
        os.environ["PETALS_CACHE_DIR"] = os.environ["PETALS_DATA_DIR"] = temporary
        for name in options.models:
            folder = MODELS[name](Path(temporary, name))
            local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            console.print(f"{name} model: {sum(weight.nbytes for weight in local.parameters()) / 1e6:.0f} MB")
            hops += [run_servers(console, name, folder, count, local, options) for count in options.hops]
            del local
        start = cold_start(folder, options.runs)
    console.print(
        f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads here (its default), "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'not set')} here; servers choose their own; "
        f"{options.pairs} pairs, {options.tokens} tokens, load {os.getloadavg()[0]:.1f}"
    )
    met = report(console, hops, start)
    if options.json:
        options.json.write_text(
            json.dumps({"hops": [asdict(item) for item in hops], "cold_start": asdict(start)}, indent=1)
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
