"""What training through servers costs: ``python3 tools/bench_training.py [--lab]``.

Forward and backward of the bench model's blocks, with gradients to the inputs and frozen blocks.

On the loopback interface one server is compared with the same Transformers blocks in this process; both take turns, so
that they see the same machine. A second backward of the same graph, which the server has used up, shows what it would
cost to compute everything anew.

With ``--lab`` three servers stand in the network lab (20 Mbit/s, round trips of 40 ms), and micro-batches that follow
each other through them are compared with the whole batch in one piece. Needs Linux and root, as the lab does.
"""

from __future__ import annotations

import sys

import environment

if __name__ == "__main__" and "--inside" not in sys.argv:  # the lab's hosts have no other network
    environment.enter()

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import local_swarm
from bench.suite import place
from petals_client import AutoDistributedModel, ClientOptions
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_core.testing import factories

READY_TIMEOUT_S = 120.0
MIN_RATIO = 0.85
MIN_LAB_RATIO = 2.0
LAB_HOST = "delay=10ms,rate=20mbit"
LAB_SERVERS = 3

Blocks = Callable[[Tensor], Tensor]


def measure_s(blocks: Blocks, hidden: Tensor, *, is_again: bool = False) -> tuple[float, float]:
    """Seconds of a forward and of its backward; of a second backward of the same graph where ``is_again``."""
    hidden = hidden.clone().requires_grad_()
    started_s = time.perf_counter()
    loss = blocks(hidden).sum()
    forward_s = time.perf_counter() - started_s
    if is_again:
        torch.autograd.grad(loss, hidden, retain_graph=True)
    started_s = time.perf_counter()
    torch.autograd.grad(loss, hidden)
    return forward_s, time.perf_counter() - started_s


def measure_in_turn(ways: dict[str, Callable[[], tuple[float, float]]], runs: int) -> dict[str, tuple[float, float]]:
    """The medians of each way; all take turns, and the first turn only warms up."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, measure in ways.items():
            sample = measure()
            if run:
                samples[name].append(sample)
    medians = {}
    for name, each in samples.items():
        forward_s, backward_s = (statistics.median(column) for column in zip(*each, strict=True))
        medians[name] = (forward_s, backward_s)
        print(
            f"{name:12} forward {forward_s:6.2f} s, backward {backward_s:6.2f} s, "
            f"together {forward_s + backward_s:6.2f} s (the quickest {min(map(sum, each)):.2f}, the slowest "
            f"{max(map(sum, each)):.2f})",
            flush=True,
        )
    return medians


@contextlib.contextmanager
def connected(folder: Path, address: str, **settings: Any) -> Any:
    """The blocks of the bench model behind a swarm."""
    options = ClientOptions.make(initial_peers=address, step_timeout_s=300.0, **settings)
    model = AutoDistributedModel.from_pretrained(folder, initial_peers=[], options=options)
    try:
        yield model.remote_blocks
    finally:
        model.close()


def on_loopback(folder: Path, hidden: Tensor, options: argparse.Namespace) -> int:
    """One server and the local blocks; returns the exit code."""
    checkpoint = Checkpoint.open(folder)
    span = load_span(checkpoint, 0, checkpoint.config.num_hidden_layers)
    with local_swarm.LocalSwarm() as swarm, contextlib.ExitStack() as stack:
        swarm.start_bootstrap()
        for start, end in local_swarm.spans(span.num_blocks, options.servers):
            swarm.start_server(folder, start, end).wait_for(local_swarm.READY, READY_TIMEOUT_S)
        blocks = stack.enter_context(connected(folder, swarm.address))
        medians = measure_in_turn(
            {
                "local": lambda: measure_s(span, hidden),
                "servers": lambda: measure_s(blocks, hidden),
                "computed anew": lambda: measure_s(blocks, hidden, is_again=True),
            },
            options.runs,
        )
    ratio = sum(medians["local"]) / sum(medians["servers"])
    anew = sum(medians["local"]) / (medians["servers"][0] + medians["computed anew"][1])
    print(
        f"{options.servers} server(s), {options.rows} x {options.tokens} tokens, medians of {options.runs}: "
        f"{ratio:.2f} of the local speed ({anew:.2f} if the backward computed the forward anew); "
        f"{torch.get_num_threads()} threads here, load {os.getloadavg()[0]:.1f}"
    )
    return 0 if ratio >= MIN_RATIO else 1


def in_lab(folder: Path, hidden: Tensor, options: argparse.Namespace) -> int:
    """Three servers of the lab, in micro-batches and in one piece; runs on the lab's client."""
    num_blocks = Checkpoint.open(folder).config.num_hidden_layers
    whole = options.rows * options.tokens
    with local_swarm.LocalSwarm() as swarm, contextlib.ExitStack() as stack:
        swarm.start_bootstrap(place=place("directory", True))
        for number, (start, end) in enumerate(local_swarm.spans(num_blocks, LAB_SERVERS), 1):
            server = swarm.start_server(folder, start, end, place=place(f"server{number}", True))
            server.wait_for(local_swarm.READY, READY_TIMEOUT_S)
        pipelined = stack.enter_context(connected(folder, swarm.address))
        in_one = stack.enter_context(
            connected(folder, swarm.address, micro_batch_tokens=whole, max_tokens_per_request=whole)
        )
        medians = measure_in_turn(
            {
                "in one piece": lambda: measure_s(in_one, hidden),
                "pipelined": lambda: measure_s(pipelined, hidden),
            },
            options.runs,
        )
    ratio = sum(medians["in one piece"]) / sum(medians["pipelined"])
    print(
        f"{LAB_SERVERS} servers in the lab ({LAB_HOST} each), {options.rows} x {options.tokens} tokens, medians of "
        f"{options.runs}: micro-batches are {ratio:.2f} times as quick as the whole batch in one piece; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    return 0 if ratio >= MIN_LAB_RATIO else 1


def enter_lab(arguments: Sequence[str]) -> int:
    """Run this tool on the client of a lab."""
    names = ("client", "directory", *(f"server{number}" for number in range(1, LAB_SERVERS + 1)))
    lab = str(Path(__file__).with_name("network_lab.py"))
    command = [sys.executable, lab, "--hosts", *(f"{name}:{LAB_HOST}" for name in names), "--on", "client"]
    os.execv(sys.executable, [*command, "--", sys.executable, __file__, *arguments, "--inside"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", action="store_true", help="three servers in the network lab")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--servers", type=int, default=1, help="on the loopback interface (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--runs", type=int, help="that count (default: 7, in the lab 3)")
    options = parser.parse_args()
    if options.lab and not options.inside:
        return enter_lab(sys.argv[1:])
    options.runs = options.runs or (3 if options.lab else 7)
    with local_swarm.stopping_in_order(), tempfile.TemporaryDirectory(prefix="petals-bench-") as temporary:
        os.environ["PETALS_CACHE_DIR"] = os.environ["PETALS_DATA_DIR"] = temporary
        folder = factories.bench_model(Path(temporary, "bench"))
        hidden = torch.randn(options.rows, options.tokens, 1024, generator=torch.Generator().manual_seed(0))
        return (in_lab if options.lab else on_loopback)(folder, hidden, options)


if __name__ == "__main__":
    sys.exit(main())
