"""What turning linear layers of a few rows round saves on this CPU: ``python3 tools/bench_few_rows.py``.

The linear layers of the bench model's 12 blocks in float32, computed one after another as they are and turned round
(``petals_server.execution.few_rows``), in turns; the least time of several rounds, by the number of rows.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter("--all-groups")

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from petals_server.execution import few_rows

NUM_BLOCKS, HIDDEN_SIZE, MLP_SIZE, KEY_SIZE = 12, 1024, 2816, 512
SHAPES = (
    *((HIDDEN_SIZE, HIDDEN_SIZE), (KEY_SIZE, HIDDEN_SIZE), (KEY_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, HIDDEN_SIZE)),
    *((MLP_SIZE, HIDDEN_SIZE), (MLP_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, MLP_SIZE)),
)
ROWS = (1, 2, 3, 4, 6, 8)


@torch.inference_mode()
def seconds(
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], weights: list[torch.Tensor], num_rows: int
) -> float:
    """Time of all layers."""
    states = {size: torch.ones(1, num_rows, size) for size in (HIDDEN_SIZE, MLP_SIZE)}
    started_s = time.perf_counter()
    for weight in weights:
        linear(states[weight.shape[1]], weight)
    return time.perf_counter() - started_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of which the least time counts (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weights = [torch.randn(shape) for _ in range(NUM_BLOCKS) for shape in SHAPES]
    table = Table("rows", "as they are, ms", "turned round, ms", title=f"{options.threads} thread(s)")
    for num_rows in ROWS:
        times = [
            [seconds(linear, weights, num_rows) for linear in (torch.nn.functional.linear, few_rows.linear)]
            for _ in range(options.rounds)
        ]
        table.add_row(str(num_rows), *(f"{1e3 * min(column):.1f}" for column in zip(*times, strict=True)))
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, torch {torch.__version__}, load "
        f"{os.getloadavg()[0]:.1f}",
        style="dim",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
