"""What multiplying linear layers by oneDNN brings on this CPU: ``python3 tools/bench_linear.py``.

The linear layers of the bench model's 12 blocks in float32, computed one after another by torch as it is and as servers
compute them (``petals_server.execution.linear``), with the weights as they are and packed, in turns; the least time of
several rounds, by the number of rows. Then what it takes to change the form of all weights, layer by layer.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter("--all-groups")

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from petals_server.execution import linear
from petals_server.execution.packing import Packing

NUM_BLOCKS, HIDDEN_SIZE, MLP_SIZE, KEY_SIZE = 12, 1024, 2816, 512
SHAPES = (
    *((HIDDEN_SIZE, HIDDEN_SIZE), (KEY_SIZE, HIDDEN_SIZE), (KEY_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, HIDDEN_SIZE)),
    *((MLP_SIZE, HIDDEN_SIZE), (MLP_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, MLP_SIZE)),
)
ROWS = (1, 2, 4, 8, 16, 64, 128, 512, 2048)


@torch.inference_mode()
def seconds(layers: list[nn.Linear], num_rows: int) -> float:
    """Time of all layers."""
    states = {size: torch.ones(1, num_rows, size) for size in (HIDDEN_SIZE, MLP_SIZE)}
    started_s = time.perf_counter()
    for layer in layers:
        layer(states[layer.in_features])
    return time.perf_counter() - started_s


def change_s(change_next: Callable[[], bool]) -> list[float]:
    """What each layer takes to change the form of its weights."""
    times, is_left = [], True
    while is_left:
        started_s = time.perf_counter()
        is_left = change_next()
        times.append(time.perf_counter() - started_s)
    return times


def make_layer(kind: type[nn.Linear], weight: torch.Tensor, *, is_packed: bool = False) -> nn.Linear:
    num_outputs, num_inputs = weight.shape
    layer = kind(num_inputs, num_outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(layer, linear.Linear) and is_packed:
        Packing([layer])
    return layer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of which the least time counts (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if linear.OPERATION is None:
        print("this torch comes without oneDNN", file=sys.stderr)
        return 1
    weights = [torch.randn(shape) for _ in range(NUM_BLOCKS) for shape in SHAPES]
    candidates = [
        [make_layer(nn.Linear, weight) for weight in weights],
        [make_layer(linear.Linear, weight) for weight in weights],
        [make_layer(linear.Linear, weight, is_packed=True) for weight in weights],
    ]
    columns = ("torch, ms", "oneDNN, ms", "times as fast", "packed, ms", "times as fast")
    table = Table("rows", *columns, title=f"{options.threads} thread(s)")
    for num_rows in ROWS:
        times = [[seconds(layers, num_rows) for layers in candidates] for _ in range(options.rounds)]
        plain_s, fast_s, packed_s = (min(column) for column in zip(*times, strict=True))
        table.add_row(
            str(num_rows),
            *(f"{1e3 * plain_s:.1f}", f"{1e3 * fast_s:.1f}", f"{plain_s / fast_s:.2f}"),
            *(f"{1e3 * packed_s:.1f}", f"{plain_s / packed_s:.2f}"),
        )
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    changing = Packing([layer for layer in candidates[1] if isinstance(layer, linear.Linear)])
    for name, change_next in (("unpacking", changing.unpack_next), ("packing", changing.pack_next)):
        layer_s = change_s(change_next)
        console.print(
            f"{name} {len(layer_s)} layers takes {1e3 * sum(layer_s):.0f} ms, one of them {1e3 * max(layer_s):.1f} ms "
            f"at most, {1e3 * statistics.median(layer_s):.1f} ms in the median",
            highlight=False,
        )
    console.print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}; servers here take "
        f"{'oneDNN' if linear.is_faster() else 'torch as it is'}",
        style="dim",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
