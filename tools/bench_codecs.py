"""What hidden states weigh on their way, and what choosing by link is worth: ``python3 tools/bench_codecs.py``.

First the bytes of a prefill of 2,048 tokens (two rows) of the demo model, on each leg between three servers: as they
are, without loss, and in int8 with the change of perplexity. Then in the network lab, with 20 Mbit/s for every host and
40 ms between any two: the seconds of that prefill with each fixed choice and with the choice by link, in turns.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter("--all-groups")

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import local_swarm
from bench.figures import Spread
from bench.suite import LAB_HOSTS, place
from demo_model import corpus, tokenizer
from make_demo_model import HELDOUT_SHARE, ROOT
from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_core.tensors.codec import Encoding, decode, encode

DEMO = ROOT / "models" / "demo"
LAB = "delay=10ms,rate=20mbit"
NUM_ROWS, NUM_COLUMNS = 2, 1024
EDGES = local_swarm.spans(8, 3)
LEGS = ("client to server 1", "server 1 to server 2", "server 2 to server 3", "server 3 to client")
MAX_INT8 = 0.46
MIN_AUTO = 0.95
READY_TIMEOUT_S = 120.0
CHOICES = ("none", "zstd", "auto")


def tokens() -> torch.Tensor:
    """Text that the model has not learned from, [2, 1024]."""
    words: Any = AutoTokenizer.from_pretrained(DEMO)
    found = corpus.collect(seed=0, heldout_share=HELDOUT_SHARE)
    row = np.concatenate(tokenizer.encode(words, found.heldout))[: NUM_ROWS * NUM_COLUMNS]
    return torch.from_numpy(row.reshape(NUM_ROWS, NUM_COLUMNS))


def num_bytes(states: torch.Tensor, encoding: Encoding | None, *, is_packed: bool) -> int:
    """What states weigh on the wire."""
    return encode(states, encoding=encoding, compression="zstd" if is_packed else "none")[0].num_bytes


def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Of the rows' tokens after their first."""
    logits = model(rows).logits[:, :-1].flatten(0, 1)
    return math.exp(float(torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())))


def through_int8(states: torch.Tensor) -> torch.Tensor:
    """What arrives of states that are sent in int8."""
    spec, buffers = encode(states, encoding=Encoding.INT8)
    return decode(spec, b"".join(buffers))


@torch.inference_mode()
def weigh(console: Console) -> bool:
    """Print the bytes of each leg; True if int8 is as small as it has to be."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    rows = tokens()
    states = model.model(rows, output_hidden_states=True, use_cache=False).hidden_states
    places = [start for start, _ in EDGES] + [8]
    before_norm: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    exact = perplexity(model, rows)
    handle.remove()
    forms: dict[str, tuple[Encoding | None, bool]] = {
        "float32": (None, False),
        "float32, zstd": (None, True),
        "float16": (Encoding.FLOAT16, False),
        "float16, zstd": (Encoding.FLOAT16, True),
        "int8": (Encoding.INT8, False),
        "int8, zstd": (Encoding.INT8, True),
    }
    table = Table("leg", *forms, "int8, zstd of float16", title=f"Bytes of a prefill of {rows.numel():,} tokens")
    sums = dict.fromkeys(forms, 0)
    for leg, block in zip(LEGS, places, strict=True):
        whole = (before_norm[0] if block == 8 else states[block]).flatten(0, 1)
        sizes = {name: num_bytes(whole, encoding, is_packed=packed) for name, (encoding, packed) in forms.items()}
        table.add_row(leg, *(f"{size:,}" for size in sizes.values()), f"{sizes['int8, zstd'] / sizes['float16']:.3f}")
        sums = {name: sums[name] + sizes[name] for name in forms}
    table.add_section()
    share = sums["int8, zstd"] / sums["float16"]
    table.add_row("all", *(f"{size:,}" for size in sums.values()), f"{share:.3f}")
    table.add_row("of float32", *(f"{size / sums['float32']:.3f}" for size in sums.values()))
    table.add_row("of float16", *(f"{size / sums['float16']:.3f}" for size in sums.values()))
    console.print(table)
    with contextlib.ExitStack() as stack:
        for block in places[:-1]:
            layer = model.model.layers[block]
            hook: Callable[..., Any] = lambda module, inputs: (through_int8(inputs[0]), *inputs[1:])  # noqa: E731
            stack.callback(layer.register_forward_pre_hook(hook).remove)
        stack.callback(model.model.norm.register_forward_pre_hook(hook).remove)
        lossy = perplexity(model, rows)
    console.print(
        f"int8: {share:.3f} of float16 for the whole prefill (at most {MAX_INT8}); perplexity {exact:.4f} exact, "
        f"{lossy:.4f} in int8, {100 * (lossy / exact - 1):+.3f} %"
    )
    return share <= MAX_INT8


def run_in_lab(rounds: int, file: Path) -> None:
    """Time the prefill with each choice in turns; runs on the client's host."""
    rows = tokens()
    with contextlib.ExitStack() as stack:
        models: dict[str, Any] = {}
        for choice in CHOICES:
            swarm = stack.enter_context(local_swarm.LocalSwarm())
            swarm.start_bootstrap(place=place("directory", True))
            servers = [
                swarm.start_server(DEMO, *edge, "--compression", choice, place=place(f"server{number}", True))
                for number, edge in enumerate(EDGES, 1)
            ]
            for server in servers:
                server.wait_for(local_swarm.READY, READY_TIMEOUT_S)
            options = ClientOptions.make(initial_peers=[swarm.address], compression=choice)
            models[choice] = AutoDistributedModelForCausalLM.from_pretrained(
                DEMO, initial_peers=[swarm.address], dtype=torch.float32, options=options
            )
            stack.callback(models[choice].close)
        seconds: dict[str, list[float]] = {choice: [] for choice in CHOICES}
        with torch.inference_mode():
            for number in range(rounds + 2):  # two that warm up: a link's rate is known once something had to wait
                for choice in CHOICES[number % 3 :] + CHOICES[: number % 3]:
                    started_s = time.perf_counter()
                    with models[choice].inference_session(max_length=NUM_COLUMNS):
                        models[choice](rows, logits_to_keep=1)
                    if number >= 2:
                        seconds[choice].append(time.perf_counter() - started_s)
        file.write_text(json.dumps(seconds))


def compare(console: Console, rounds: int) -> bool:
    """Print the seconds of each choice in the lab; True if choosing by link is as good as it has to be."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        hosts = [f"{host}:{LAB}" for host in LAB_HOSTS]
        tool = Path(__file__).parent / "network_lab.py"
        inside = [sys.executable, __file__, "--in-lab", file.name, "--rounds", str(rounds)]
        subprocess.run([sys.executable, str(tool), "--hosts", *hosts, "--", *inside], check=True)
        seconds: dict[str, list[float]] = json.loads(Path(file.name).read_text())
    table = Table("choice", "seconds", title="The same prefill with 20 Mbit/s and 40 ms between hosts")
    for choice, values in seconds.items():
        table.add_row(choice, str(Spread.of(values)))
    console.print(table)
    medians = {choice: statistics.median(values) for choice, values in seconds.items()}
    best = min(("none", "zstd"), key=medians.__getitem__)
    share = statistics.median(fixed / auto for fixed, auto in zip(seconds[best], seconds["auto"], strict=True))
    console.print(f"auto: {share:.3f} of the speed of the best fixed choice, {best} (at least {MIN_AUTO})")
    return share >= MIN_AUTO


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of each choice in the lab (default: %(default)s)")
    parser.add_argument("--no-lab", action="store_true", help="bytes alone")
    parser.add_argument("--in-lab", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with local_swarm.stopping_in_order():
        if options.in_lab:
            run_in_lab(options.rounds, options.in_lab)
            return 0
        console = Console(width=None if sys.stdout.isatty() else 140)
        is_met = weigh(console)
        if not options.no_lab:
            is_met &= compare(console, options.rounds)
    console.print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", style="dim")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
