"""A chain of three servers on slow networks: ``python3 tools/bench_chain.py [--json FILE]``.

Runs itself in the network lab (docs/network-lab.md): a client and three servers, each on a host of its own, kernel TCP
between them. *Decoding*, 50 ms one way between any two hosts: a step should take the one-way delays around the ring and
the computing, and next to nothing more. *Prefill* of 2,048 tokens, 20 ms one way, at two rates: in parts that follow
each other through the chain, and in one piece; beside the slowest stage, a link or all computing together (the servers
share this machine's cores, so it is measured with as many prompts under way as there are cores; before and after the
others, as a machine's speed may change), and beside the processor time that everything in the lab took meanwhile, the
router and the encryption included; and on hosts whose kernels let connections keep their windows in pauses; and in
parts on links that lose packets. Servers are started anew for each rate, because connections remember what a slower
link took. *Forward* of as many tokens in 16 rows, without a session and gradients: around the ring in parts, and in one
piece. Compression is off, so that the bytes are those of the states. Needs root.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import local_swarm
from lab import sandbox
from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_core.testing import factories

TOOLS = Path(__file__).resolve().parent
HOSTS = ("client", "a", "b", "c")
ONE_WAY_S = 0.05
PREFILL_ONE_WAY_S = 0.02
PREFILL_TOKENS = 2048
FORWARD_ROWS = 16
TARGETS = {20: 2.5, 100: 1.4}
"""Mbit/s: how many times as fast as in one piece."""
PAYLOAD_SHARE = 1448 / 1500
"""Of a rate of whole IP packets, what TCP's payload can get."""
READY_TIMEOUT_S = 120.0
NUM_CORES = os.cpu_count() or 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Medians of steps of one token, in seconds."""

    step_s: float
    compute_s: float
    """Of all servers."""
    delays_s: float
    """Around the ring, as they were asked of the lab."""
    num_steps: int

    @property
    def bound_s(self) -> float:
        return 1.03 * (self.delays_s + self.compute_s) + 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One prompt, at one rate, in seconds."""

    rate_mbit: int
    parts_s: float
    whole_s: float
    link_s: float
    """What the bytes of the states take on one link."""
    alone_s: float
    """Computing of all servers, one after another for the prompt in one piece, over the number of cores."""
    compute_s: float
    """Computing of all servers together on the cores that they share: see ``measure_computing``. The mean of before and
    after everything else."""
    work_s: float
    """Processor time of the whole lab while the prompt went in parts, over the number of cores."""
    kept_s: float
    """In parts, on hosts whose kernels keep connections' windows in pauses."""

    @property
    def slowest_s(self) -> float:
        return max(self.link_s, self.compute_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One prompt in parts, on links that lose packets at random, in seconds."""

    rate_mbit: int
    lost_percent: float
    parts_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A forward without a session, at one rate, in seconds."""

    rate_mbit: int
    parts_s: float
    whole_s: float


def change_network(**settings: str) -> None:
    """Connect all hosts in another way."""
    text = ",".join(f"{name}={value}" for name, value in settings.items())
    command = [sys.executable, str(TOOLS / "network_lab.py"), "--change", *(f"{host}:{text}" for host in HOSTS)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def keep_windows(is_on: bool) -> None:
    """Whether the kernels of all hosts keep what a connection may have under way when it has sent nothing for long."""
    command = f"echo {int(not is_on)} > /proc/sys/net/ipv4/tcp_slow_start_after_idle"
    for host in HOSTS:
        subprocess.run([*place(host).prefix, "sh", "-c", command], check=True)


def place(host: str) -> local_swarm.Place:
    """Where a host's processes run."""
    prefix = (sys.executable, str(TOOLS / "network_lab.py"), "--on", host, "--")
    return local_swarm.Place(host=sandbox.address_of(HOSTS.index(host)), prefix=prefix)


def start_servers(swarm: local_swarm.LocalSwarm, folder: Path) -> list[local_swarm.Process]:
    """All that a chain needs, each on a host of its own, ready and on a network without delays."""
    change_network(delay="0ms", rate="unlimited")
    processes = [
        swarm.start_server(folder, start, end, "--compression", "none", "--threads", "1", place=place(host))
        for host, (start, end) in zip(HOSTS[1:], local_swarm.spans(12, 3), strict=True)
    ]
    for process in processes:
        process.wait_for(local_swarm.READY, READY_TIMEOUT_S)
    return processes


def stop_servers(processes: Sequence[local_swarm.Process]) -> None:
    for process in processes:
        process.interrupt()
    for process in processes:
        process.stop()


def load(folder: Path, address: str, part_tokens: int | None) -> Any:
    options = ClientOptions.make(
        initial_peers=[address], compression="none", part_tokens=part_tokens, micro_batch_tokens=part_tokens
    )
    return AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=[address], options=options, dtype=torch.float32
    )


@torch.inference_mode()
def measure_decoding(model: Any, num_steps: int) -> Decoding:
    with model.inference_session(max_length=64 + num_steps) as session:
        model(torch.arange(3, 19).unsqueeze(0))
        for number in range(num_steps):
            model(torch.tensor([[3 + number]]))
        steps = session.trace()[-num_steps:]
    assert not any(hop.is_carried for step in steps for hop in step.hops)
    return Decoding(
        step_s=statistics.median(step.total_s for step in steps),
        compute_s=statistics.median(sum(hop.compute_s for hop in step.hops) for step in steps),
        delays_s=len(HOSTS) * ONE_WAY_S,
        num_steps=num_steps,
    )


def processor_time_s() -> float:
    """Of all processes of the lab so far: servers, client, and the router, for whom the kernel's TCP works too."""
    num_ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            user, system = path.read_text().rpartition(")")[2].split()[11:13]
            num_ticks += int(user) + int(system)
    return num_ticks / TICKS_PER_S


def computing_time_s(servers: Sequence[local_swarm.Process]) -> dict[tuple[int, str], float]:
    """Processor time of each thread of the servers so far, by the server's place and the thread's number."""
    places = {str(server.pid): place for place, server in enumerate(servers)}  # each has a session of processes
    times_s = {}
    for path in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            if fields[3] in places:
                times_s[places[fields[3]], path.parent.name] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return times_s


def measure_computing(
    console: Console, folder: Path, address: str, servers: Sequence[local_swarm.Process], num_runs: int
) -> float:
    """Seconds in which this machine's cores compute a prompt, in one piece in each server, with others at work beside.

    As many prompts are under way as there are cores, on a network that does not count: cores share caches and memory,
    so that computing takes longer than in a server alone. When prompts meet at one server all but one wait, so not all
    cores compute all the time. It is the processor time of the thread of each server that computes, over the number of
    cores: the network, the encryption and the client are left out, and so is waiting.
    """

    def send(model: Any) -> None:
        for run in range(num_runs):
            prefill(model, run)

    change_network(delay="0ms", rate="unlimited")
    models = [load(folder, address, PREFILL_TOKENS) for _ in range(min(NUM_CORES, len(servers)))]
    for model in models:
        prefill(model, 0)
    before = computing_time_s(servers)
    with ThreadPoolExecutor(len(models)) as clients:
        list(clients.map(send, models))
    after = computing_time_s(servers)
    spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
    per_server = [max(s for (place, _), s in spent.items() if place == number) for number in range(len(servers))]
    for model in models:
        model.close()
    prompt_s = sum(per_server) / (num_runs * len(models)) / min(NUM_CORES, len(servers))
    console.print(f"  {prompt_s:.2f} s of computing for a prompt on all cores", style="dim")
    return prompt_s


@torch.inference_mode()
def prefill(model: Any, seed: int) -> tuple[float, float, float]:
    """Seconds of a prompt in a session that is open, of computing it, and of processor time in the lab meanwhile."""
    tokens = torch.randint(3, 259, (1, PREFILL_TOKENS), generator=torch.Generator().manual_seed(seed))
    with model.inference_session(max_length=PREFILL_TOKENS) as session:
        model(tokens[:, :1])
        session.truncate(0)
        work_s, started_s = processor_time_s(), time.perf_counter()
        model(tokens, logits_to_keep=1)  # as ``generate`` calls it
        taken_s, work_s = time.perf_counter() - started_s, processor_time_s() - work_s
        return taken_s, sum(hop.compute_s for hop in session.trace()[-1].hops), work_s


def measure_prefill(
    pipelined: Any, whole: Any, rate_mbit: int, hidden_size: int, num_runs: int, compute_s: float
) -> Prefill:
    parts, wholes = [], []
    for run in range(num_runs):
        parts.append(prefill(pipelined, run))
        wholes.append(prefill(whole, run))
    keep_windows(True)
    kept = [prefill(pipelined, run) for run in range(num_runs)]
    keep_windows(False)
    return Prefill(
        rate_mbit=rate_mbit,
        parts_s=statistics.median(taken_s for taken_s, _, _ in parts),
        whole_s=statistics.median(taken_s for taken_s, _, _ in wholes),
        link_s=PREFILL_TOKENS * hidden_size * 4 * 8 / (rate_mbit * 1e6 * PAYLOAD_SHARE),
        alone_s=statistics.median(alone_s for _, alone_s, _ in wholes) / min(NUM_CORES, len(HOSTS) - 1),
        compute_s=compute_s,
        work_s=statistics.median(work_s for _, _, work_s in parts) / NUM_CORES,
        kept_s=statistics.median(taken_s for taken_s, _, _ in kept),
    )


def measure_loss(folder: Path, address: str, rate_mbit: int, lost_percent: float, num_runs: int) -> Loss:
    change_network(delay=f"{500 * PREFILL_ONE_WAY_S:g}ms", rate=f"{rate_mbit}mbit", loss=f"{lost_percent / 2:g}%")
    model = load(folder, address, None)
    prefill(model, num_runs)  # opens connections, which then know their links
    taken = [prefill(model, run)[0] for run in range(num_runs)]
    model.close()
    return Loss(rate_mbit=rate_mbit, lost_percent=lost_percent, parts_s=statistics.median(taken))


@torch.inference_mode()
def forward(model: Any, seed: int) -> float:
    """Seconds of a batch through the blocks alone."""
    shape = (FORWARD_ROWS, PREFILL_TOKENS // FORWARD_ROWS, model.config.hidden_size)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    started_s = time.perf_counter()
    model.remote_blocks(hidden)
    return time.perf_counter() - started_s


def measure_forward(pipelined: Any, whole: Any, rate_mbit: int, num_runs: int) -> Batch:
    times = [(forward(pipelined, run), forward(whole, run)) for run in range(num_runs)]
    return Batch(
        rate_mbit=rate_mbit,
        parts_s=statistics.median(parts_s for parts_s, _ in times),
        whole_s=statistics.median(whole_s for _, whole_s in times),
    )


def measure(console: Console, options: argparse.Namespace) -> tuple[Decoding, list[Prefill], list[Batch], list[Loss]]:
    """Everything, in the lab."""
    with tempfile.TemporaryDirectory(prefix="petals-bench-") as temporary, local_swarm.LocalSwarm() as swarm:
        os.environ["PETALS_CACHE_DIR"] = os.environ["PETALS_DATA_DIR"] = temporary
        folder = factories.bench_model(Path(temporary, "bench"))
        change_network(delay="0ms", rate="unlimited")
        swarm.start_bootstrap(place=place("a"))
        processes = start_servers(swarm, folder)
        console.print("decoding", style="dim")
        change_network(delay=f"{500 * ONE_WAY_S:g}ms", rate="unlimited")
        model = load(folder, swarm.address, None)
        decoding = measure_decoding(model, options.steps)
        console.print(
            f"  {1e3 * decoding.step_s:.1f} ms a step, {1e3 * decoding.compute_s:.1f} ms of computing", style="dim"
        )
        hidden_size = model.config.hidden_size
        model.close()
        computing_s = [measure_computing(console, folder, swarm.address, processes, options.runs)]
        figures: list[Prefill] = []
        batches: list[Batch] = []
        for rate_mbit in options.rates:
            console.print(f"prefill at {rate_mbit} Mbit/s", style="dim")
            stop_servers(processes)
            processes = start_servers(swarm, folder)
            change_network(delay=f"{500 * PREFILL_ONE_WAY_S:g}ms", rate=f"{rate_mbit}mbit")
            pipelined, whole = load(folder, swarm.address, None), load(folder, swarm.address, PREFILL_TOKENS)
            last = measure_prefill(pipelined, whole, rate_mbit, hidden_size, options.runs, computing_s[-1])
            console.print(f"  {last.whole_s:.2f} s in one piece, {last.parts_s:.2f} s in parts", style="dim")
            batches.append(measure_forward(pipelined, whole, rate_mbit, options.runs))
            console.print(
                f"  forward: {batches[-1].whole_s:.2f} s in one piece, {batches[-1].parts_s:.2f} s around the ring",
                style="dim",
            )
            pipelined.close()
            whole.close()
            computing_s.append(measure_computing(console, folder, swarm.address, processes, options.runs))
            figures.append(replace(last, compute_s=statistics.mean(computing_s[-2:])))
        losses = []
        if options.lost:
            stop_servers(processes)
            processes = start_servers(swarm, folder)
        for lost_percent in options.lost:
            console.print(f"{lost_percent:g} % of packets lost, {max(options.rates)} Mbit/s", style="dim")
            losses.append(measure_loss(folder, swarm.address, max(options.rates), lost_percent, options.runs))
            console.print(f"  {losses[-1].parts_s:.2f} s in parts", style="dim")
    return decoding, figures, batches, losses


def report(
    console: Console, decoding: Decoding, figures: list[Prefill], batches: list[Batch], losses: list[Loss]
) -> bool:
    """Print figures beside their targets; True if all are met."""
    table = Table("figure", "measured", "target", "", title="A chain of three servers")
    checks: list[bool] = []

    def row(figure: str, measured: str, target: str = "", met: bool | None = None) -> None:
        table.add_row(figure, measured, target, "" if met is None else "[green]met[/]" if met else "[red]missed[/]")
        checks.append(met is not False)

    row(
        "step of one token, 50 ms one way",
        f"{1e3 * decoding.step_s:.1f} ms",
        f"{1e3 * decoding.bound_s:.1f} ms",
        decoding.step_s <= decoding.bound_s,
    )
    row("  of which computing", f"{1e3 * decoding.compute_s:.1f} ms")
    for each in figures:
        name, target = f"{PREFILL_TOKENS} tokens at {each.rate_mbit} Mbit/s", TARGETS.get(each.rate_mbit)
        row(f"{name}, in one piece", f"{each.whole_s:.2f} s")
        gain = each.whole_s / each.parts_s
        row(
            f"{name}, in parts",
            f"{each.parts_s:.2f} s",
            f"{1.2 * each.slowest_s:.2f} s",
            each.parts_s <= 1.2 * each.slowest_s,
        )
        row("  times as fast", f"{gain:.2f}", f"{target}", None if target is None else gain >= target)
        row("  one link alone", f"{each.link_s:.2f} s")
        row("  all computing, each server alone", f"{each.alone_s:.2f} s")
        row("  all computing, a prompt for each core", f"{each.compute_s:.2f} s")
        row("  all that the cores did in the lab", f"{each.work_s:.2f} s")
        row("  in parts, hosts that keep windows in pauses", f"{each.kept_s:.2f} s")
    for batch in batches:
        name = f"forward of {FORWARD_ROWS} x {PREFILL_TOKENS // FORWARD_ROWS} at {batch.rate_mbit} Mbit/s"
        row(f"{name}, in one piece", f"{batch.whole_s:.2f} s")
        row(f"{name}, around the ring", f"{batch.parts_s:.2f} s")
        row("  times as fast", f"{batch.whole_s / batch.parts_s:.2f}")
    for loss in losses:
        name = f"{PREFILL_TOKENS} tokens at {loss.rate_mbit} Mbit/s, {loss.lost_percent:g} % of packets lost"
        row(name, f"{loss.parts_s:.2f} s")
    console.print(table)
    return all(checks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--steps", type=int, default=60, help="to time (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="prompts of each kind (default: %(default)s)")
    parser.add_argument("--rates", type=int, nargs="+", default=[20, 100], help="Mbit/s (default: 20 100)")
    parser.add_argument(
        "--lost", type=float, nargs="*", default=[0.1, 1], metavar="PERCENT", help="of packets (default: 0.1 1)"
    )
    options = parser.parse_args()
    if sandbox.FOLDER_VARIABLE not in os.environ:
        lab = [sys.executable, str(TOOLS / "network_lab.py"), "--hosts", *HOSTS, "--on", HOSTS[0], "--"]
        os.execv(sys.executable, [*lab, sys.executable, *sys.argv])
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    console = Console(width=120)
    with local_swarm.stopping_in_order():
        decoding, figures, batches, losses = measure(console, options)
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    met = report(console, decoding, figures, batches, losses)
    if options.json:
        content = {
            "decoding": asdict(decoding),
            "prefill": [asdict(each) for each in figures],
            "forward": [asdict(each) for each in batches],
            "loss": [asdict(each) for each in losses],
        }
        options.json.write_text(json.dumps(content, indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
