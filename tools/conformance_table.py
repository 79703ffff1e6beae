"""The outcomes of ``conformance`` for many architectures, printed."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from conformance import NUM_NEW_TOKENS, SPANS, Outcome, check
from petals_core.testing.factories import FAMILIES

COLUMNS = ("architecture", "padded batch", "session", "greedy tokens", "distinct", "time", "exact")


def run(families: Sequence[str], *, as_markdown: bool) -> int:
    """Compare, print, and return 0 if all are exact, 1 if some are not, 2 if there is no such family."""
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        Console(stderr=True).print(f"error: there is no factory for {', '.join(unknown)}: use {', '.join(FAMILIES)}")
        return 2
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("petals_server").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    started_s = time.perf_counter()
    outcomes = _compare(families or sorted(FAMILIES))
    total_s = time.perf_counter() - started_s
    rows = [_row(outcome) for outcome in outcomes]
    num_exact = sum(outcome.is_exact for outcome in outcomes)
    spans = ", ".join(f"{start}:{end}" for start, end in SPANS)
    summary = (
        f"{num_exact} of {len(outcomes)} exact in {total_s:.0f} s: spans {spans}, float32, "
        f"Transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores"
    )
    if as_markdown:
        _print_markdown(rows, summary)
    else:
        table = Table(*COLUMNS)
        for row in rows:
            table.add_row(*row)
        console = Console()
        console.print(table)
        console.print(summary)
    return 0 if num_exact == len(outcomes) else 1


def _compare(families: Sequence[str]) -> list[Outcome]:
    outcomes = []
    for family in track(families, console=Console(stderr=True), description="comparing", transient=True):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(check(family, Path(folder) / f"tiny-{family}"))
    return outcomes


def _row(outcome: Outcome) -> tuple[str, ...]:
    return (
        outcome.family,
        f"{outcome.padded_error:.1e}",
        f"{outcome.session_error:.1e}",
        f"{outcome.num_equal_tokens} of {NUM_NEW_TOKENS}",
        str(outcome.num_distinct_tokens),
        f"{outcome.total_s:.1f} s",
        "yes" if outcome.is_exact else "NO",
    )


def _print_markdown(rows: Sequence[Sequence[str]], summary: str) -> None:
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print(f"| {' | '.join(row)} |")
    print()
    print(summary)
