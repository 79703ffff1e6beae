"""Everything that can happen to a server in a session: ``python3 tools/fault_table.py --seed 0``.

Six server processes hold every block of a small model twice, each behind a TCP proxy. For each cell of the table a
client generates in a session, and something happens to the first, middle or last server of its chain, or to two at
once: it is killed (SIGKILL), stopped (SIGSTOP), restarted under the same identity, told to stop (SIGTERM: it drains),
its connections are cut, delayed by 5 s, corrupted, or its replies vanish. A cell is good if all tokens are those of the
local model in float32, no other server is blamed, and after 5 s servers and client have no more sessions, pages, tasks,
streams and sockets than before. With ``--dtype bfloat16`` tokens that were given must stay, and the others be such as a
local model gives whose cache was computed anew when the fault struck, but for ties of rounding. These servers do not
measure their neighbours now and then, as others do: one that is stopped meanwhile leaves a socket that is none of the
session's. Prints the table, and what was wrong in each bad cell. Exit code 0: all cells are good.
"""

from __future__ import annotations

import argparse
import sys

import environment

if __name__ == "__main__":
    environment.enter()

import statistics
from collections import defaultdict

from rich.console import Console
from rich.table import Table

import fault_run
from local_swarm import stopping_in_order


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and moments (default: %(default)s)")
    parser.add_argument("--faults", nargs="+", choices=fault_run.FAULTS, default=fault_run.FAULTS, metavar="FAULT")
    parser.add_argument("--targets", nargs="+", choices=fault_run.TARGETS, default=fault_run.TARGETS, metavar="TARGET")
    parser.add_argument("--moments", nargs="+", choices=fault_run.MOMENTS, default=fault_run.MOMENTS, metavar="MOMENT")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    options = parser.parse_args()
    console = Console()
    fault_run.quiet()
    results: dict[tuple[str, str], dict[str, fault_run.Result]] = defaultdict(dict)
    bad: list[fault_run.Result] = []
    with stopping_in_order(), fault_run.FaultLab(seed=options.seed, torch_dtype=options.dtype) as lab:
        for cell in fault_run.cells(options.faults, options.targets, options.moments):
            result = lab.run(cell)
            results[cell.fault, cell.target][cell.moment] = result
            verdict = "good" if not result.problems else "; ".join(result.problems)
            console.print(f"{cell}: {verdict} ({result.total_s:.1f} s)", style=None if not result.problems else "red")
            bad += [result] if result.problems else []
    table = Table("fault", "server", *options.moments, title=f"Seconds of a cell in {options.dtype}")
    for (fault, target), row in results.items():
        table.add_row(
            fault,
            target,
            *(
                f"{row[moment].total_s:.1f}" if not row[moment].problems else "[red]bad[/]"
                for moment in options.moments
            ),
        )
    console.print(table)
    times_s = [result.total_s for row in results.values() for result in row.values()]
    console.print(
        f"{len(times_s) - len(bad)} of {len(times_s)} cells are good, median {statistics.median(times_s):.1f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
