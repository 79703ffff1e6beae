"""Many users on one server: ``python3 tools/bench_engine.py sessions|prompt|memory|overload|kills|all``.

Each command starts a server by its public command, loads it from this process (or from processes that it starts) over
the loopback interface with TLS as always, prints its figures beside what is asked for, and fails if a target is missed.

- ``sessions``: independent sessions that step token by token, beside the engine's packed batch without a network in the
  same run, and client processes that call ``generate``; with ``--baseline REVISION`` also a lone session's step beside
  a server of that revision.
- ``prompt``: a prompt of 4,096 tokens that arrives while 8 sessions decode.
- ``memory``: 64 sessions of 400 tokens in the room that reserving 2,048 for each of 16 would take.
- ``overload``: ten times as many sessions as the cache holds, with deadlines of 10 s.
- ``kills``: 50 clients in a few processes that are killed in the middle of a step.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as a server has it; read when torch is imported

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

import local_swarm
from engine_load import figures as reports
from engine_load import kills, prompts, room, sharing
from petals_core.net.loop import run
from petals_core.testing import factories

COMMANDS = ("sessions", "prompt", "memory", "overload", "kills")
TITLES = {
    "sessions": "Sessions that share a server, bench model in bfloat16",
    "prompt": "A long prompt beside sessions that decode, bench model in bfloat16",
    "memory": "Sessions that share the cache, thin model in float32",
    "overload": "Overload, bench model in float32",
    "kills": "Clients killed in the middle of a step, bench model in float32",
}


async def measure(command: str, folder: Path, console: Console, options: argparse.Namespace) -> list[reports.Figure]:
    """The figures of one command."""
    if command == "sessions":
        return await sharing.measure(
            folder,
            options.numbers,
            num_rounds=options.rounds,
            num_tokens=options.tokens,
            baseline=options.baseline,
            processes=options.processes,
        )
    if command == "prompt":
        figures, lines = await prompts.measure(folder)
        for line in lines:
            console.print(line, highlight=False)
        return figures
    if command == "memory":
        return await room.measure_sessions(folder)
    if command == "overload":
        return await room.measure_overload(folder)
    return await kills.measure(folder)


def make_model(command: str, folder: Path) -> Path:
    """The checkpoint that a command wants, made when it is first wanted."""
    name = {"memory": "thin", "sessions": "bench-bfloat16", "prompt": "bench-bfloat16"}.get(command, "bench-float32")
    path = folder / name
    if not path.exists():
        if name == "thin":
            factories.thin_model(path)
        else:
            factories.bench_model(path, dtype=getattr(torch, name.removeprefix("bench-")))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*COMMANDS, "all", "clients"])
    parser.add_argument("address", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 4, 8, 16], help="of sessions (default: 1 4 8 16)")
    parser.add_argument("--rounds", type=int, default=8, help="in which all take turns (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="of each session in a round (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[4], help="also so many client processes that call generate"
    )
    parser.add_argument("--baseline", metavar="REVISION", help="compare a lone session's step with this revision's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    if options.command == "clients":
        run(kills.step_for_ever(options.address))
        return 0
    if 1 not in options.numbers:
        options.numbers.insert(0, 1)
    console = Console()
    commands = COMMANDS if options.command == "all" else (options.command,)
    is_met, results = True, {}
    with local_swarm.stopping_in_order(), tempfile.TemporaryDirectory(prefix="petals-bench-") as temporary:
        os.environ["PETALS_CACHE_DIR"] = os.environ["PETALS_DATA_DIR"] = temporary
        for command in commands:
            folder = make_model(command, Path(temporary))
            measured = run(measure(command, folder, console, options))
            is_met &= reports.report(console, TITLES[command], measured)
            results[command] = [asdict(figure) for figure in measured]
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if is_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
