"""Processor time that a server takes for a prompt in parts: ``python3 tools/bench_parts.py``.

A prompt of 2,048 tokens goes through four blocks of the bench model in float32, one thread, as a server computes a
session's steps: the same packed weights, attention and pages of the cache, without network and engine. First by one
process, then by two at the same time, which shows what they take from each other; medians of several rounds. Beside
it what the blocks' linear layers take of it, computed one after another.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter("--all-groups")

import argparse
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_core.testing import factories
from petals_server import threads
from petals_server.cache.pages import CachePages, plan_groups
from petals_server.cache.tensors import CPU_PAGE_TOKENS, CacheTensors
from petals_server.execution import linear, packing
from petals_server.execution.changes import RowChange
from petals_server.execution.probe import find_layout
from petals_server.execution.steps import StepRunner
from petals_server.scheduling.plan import RowPart

NUM_BLOCKS, NUM_TOKENS = 4, 2048
PARTS = (32, 64, 128, 256, 512)


def make_runner(folder: Path) -> tuple[StepRunner, CachePages]:
    """The first blocks, ready to compute as a server has them."""
    span = load_span(Checkpoint.open(str(folder)), 0, NUM_BLOCKS, dtype=torch.float32, device="cpu")
    packing.install(span)
    layout = find_layout(span)
    groups = plan_groups([kind.window for kind in layout.kinds], num_tokens=NUM_TOKENS, page_tokens=CPU_PAGE_TOKENS)
    pages = CachePages(groups, page_tokens=CPU_PAGE_TOKENS)
    cache = CacheTensors(layout.kinds, pages, dtype=span.dtype, device=span.device)
    plan = threads.ThreadPlan(decode=1, bulk=1, decode_tokens_per_s=1.0, bulk_tokens_per_s=1.0)
    return StepRunner(span, cache, first_layer=0, form=layout.form, threads=plan), pages


def prompt_s(runner: StepRunner, pages: CachePages, states_TH: torch.Tensor, part: int) -> float:  # noqa: N803
    """Processor time of the prompt in parts of so many tokens."""
    session = pages.open(1)
    change = RowChange(prompts=None, adapters=())
    started_s = time.thread_time()
    for past in range(0, NUM_TOKENS, part):
        session.grow([past], [part])
        session.grow_window(0, past, part)
        row = RowPart(row=0, start=0, count=part, past=past, runs=session.runs(0))
        runner.compute(states_TH[past : past + part], np.arange(past, past + part), [row], [change])
    taken_s = time.thread_time() - started_s
    session.close()
    return taken_s


def linear_s(span: Span, part: int) -> float:
    """Processor time of the linear layers alone."""
    layers = [module for module in span.blocks.modules() if isinstance(module, torch.nn.Linear)]
    states = {size: torch.ones(part, size) for size in {layer.in_features for layer in layers}}
    started_s = time.thread_time()
    for _ in range(NUM_TOKENS // part):
        for layer in layers:
            layer(states[layer.in_features])
    return time.thread_time() - started_s


@torch.inference_mode()
def work(folder: Path, num_rounds: int, orders: Connection) -> None:
    """A process that says what it took each time that it is told to begin."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    runner, pages = make_runner(folder)
    states_TH = torch.randn(NUM_TOKENS, runner.span.hidden_size, generator=torch.Generator().manual_seed(0))  # noqa: N806
    prompt_s(runner, pages, states_TH, PARTS[-1])
    gc.freeze()
    orders.send(())
    while (part := orders.recv()) is not None:
        orders.send(
            [(prompt_s(runner, pages, states_TH, part), linear_s(runner.span, part)) for _ in range(num_rounds)]
        )


def measure(part: int, workers: list[Connection]) -> tuple[float, float]:
    """Medians of all that these took at the same time: of the whole and of the linear layers."""
    for worker in workers:
        worker.send(part)
    whole, products = zip(*(taken for worker in workers for taken in worker.recv()), strict=True)
    return statistics.median(whole), statistics.median(products)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--model", type=Path, help="a folder of the bench model (default: it is made, in a minute)")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or factories.bench_model(scratch)
        workers = []
        for _ in range(2):
            here, there = context.Pipe()
            context.Process(target=work, args=(folder, options.rounds, there), daemon=True).start()
            here.recv()
            workers.append(here)
        columns = ("alone, s", "linear of it, s", "two at once, s each", "linear of it, s")
        table = Table("tokens in a part", *columns)
        for part in PARTS:
            times = [*measure(part, workers[:1]), *measure(part, workers)]
            table.add_row(str(part), *(f"{each:.3f}" for each in times))
        for worker in workers:
            worker.send(None)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}, load {os.getloadavg()[0]:.1f}; linear layers by "
        f"{'oneDNN' if linear.is_faster() else 'torch as it is'}",
        style="dim",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
