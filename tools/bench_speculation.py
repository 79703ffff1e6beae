"""What drafts bring: ``python3 tools/bench_speculation.py [--rounds N] [--no-lab] [--json FILE]``.

Three servers of the demo model, separate processes, first on the loopback interface and then in the network lab with
100 ms between any two hosts. The same text is generated without drafts and with them in turn; ratios are of such pairs.
Ordinary prompts are beginnings of text that neither model has learned from. Text that repeats itself is a document that
is written again with a word changed here and there; the demo model is too small to do that by itself, so that its
choice is confined to the document, token by token, while drafts know nothing of it but the prompt.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter("--all-groups")

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging

import local_swarm
from bench.figures import Spread
from bench.suite import LAB_HOSTS, place
from bench.text import DEMO, DRAFT, beginnings
from demo_model import corpus
from make_demo_model import HELDOUT_SHARE
from petals_client import AutoDistributedModelForCausalLM

LAB = "delay=25ms"
READY_TIMEOUT_S = 120.0
PROMPT_TOKENS = 16
DOCUMENT_TOKENS = 160
WORDS_PER_CHANGE = 25
MIN_LOOKUP, MIN_DRAFT, MIN_LAB, MIN_LOOPBACK = 2.0, 2.5, 2.0, 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is generated, and with which drafts."""

    name: str
    is_rewriting: bool
    options: dict[str, Any]
    loopback_target: float | None
    lab_target: float | None
    trip_target: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a case on one network."""

    network: str
    case: str
    off: Spread
    """Tokens per second without drafts."""
    on: Spread
    ratio: Spread
    tokens_per_trip: float
    beside_trips: float
    """Share of the time with drafts in which nothing was on its way: all that drafting meanwhile could ever save."""
    is_same: bool
    ratio_target: float | None
    trip_target: float | None

    @property
    def is_met(self) -> bool:
        """Whether all targets are."""
        fast = self.ratio_target is None or self.ratio.median >= self.ratio_target
        return self.is_same and fast and (self.trip_target is None or self.tokens_per_trip >= self.trip_target)


def cases() -> list[Case]:
    """What is measured."""
    draft = {"draft_model": str(DRAFT)}
    return [
        Case(
            name="ordinary prompts, auto without a draft model",
            is_rewriting=False,
            options={},
            loopback_target=MIN_LOOPBACK,
            lab_target=None,
            trip_target=None,
        ),
        Case(
            name="ordinary prompts, auto with the draft model",
            is_rewriting=False,
            options=draft,
            loopback_target=MIN_LOOPBACK,
            lab_target=MIN_LAB,
            trip_target=None,
        ),
        Case(
            name="ordinary prompts, draft model alone, 8 drafts",
            is_rewriting=False,
            options={**draft, "speculation": "draft", "num_drafts": 8},
            loopback_target=None,
            lab_target=None,
            trip_target=MIN_DRAFT,
        ),
        Case(
            name="rewriting a document, lookup",
            is_rewriting=True,
            options={"speculation": "lookup"},
            loopback_target=MIN_LOOPBACK,
            lab_target=None,
            trip_target=MIN_LOOKUP,
        ),
    ]


def prompts(count: int) -> list[torch.Tensor]:
    """Beginnings of text that the models have not seen."""
    return [torch.tensor([each]) for each in beginnings(count, PROMPT_TOKENS)]


def documents(count: int) -> list[tuple[torch.Tensor, list[int]]]:
    """Prompts with a document, and the document as it is to be written again."""
    words: Any = AutoTokenizer.from_pretrained(DEMO)
    found = corpus.collect(seed=0, heldout_share=HELDOUT_SHARE)
    pairs = []
    for document in found.heldout:
        text = document.text.split(" ")
        changed = [word if (index + 1) % WORDS_PER_CHANGE else "thing" for index, word in enumerate(text)]
        before, after = (words(" ".join(each), add_special_tokens=False)["input_ids"] for each in (text, changed))
        if min(len(before), len(after)) >= DOCUMENT_TOKENS:
            begin = [words.bos_token_id, *before[:DOCUMENT_TOKENS]]
            pairs.append((torch.tensor([begin]), after[:DOCUMENT_TOKENS]))
        if len(pairs) == count:
            break
    return pairs


def generate(
    model: Any, prompt: torch.Tensor, num_tokens: int, **options: Any
) -> tuple[torch.Tensor, float, int, float]:
    """All tokens, the seconds they took, the trips after the prompt's, and the seconds that all trips took."""
    with model.inference_session(max_length=prompt.shape[1] + num_tokens) as session:
        started_s = time.perf_counter()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            **options,
        )
        elapsed_s = time.perf_counter() - started_s
        trips = session.trace()
        return tokens, elapsed_s, len(trips) - 1, sum(trip.total_s for trip in trips)


def confined(prompt: torch.Tensor, document: Sequence[int]) -> Callable[[int, torch.Tensor], list[int]]:
    """Allow what continues a document behind a prompt."""
    length = prompt.shape[1]
    return lambda row, tokens: [document[tokens.shape[0] - length]]


def measure(model: Any, network: str, case: Case, num_tokens: int, rounds: int) -> Outcome:
    """Generate without and with drafts in turn, several times."""
    off, on, ratios = [], [], []
    num_new = num_trips = 0
    drafted_s = away_s = 0.0
    is_same = True
    work: list[tuple[torch.Tensor, dict[str, Any]]]
    if case.is_rewriting:
        work = [(prompt, {"prefix_allowed_tokens_fn": confined(prompt, text)}) for prompt, text in documents(rounds)]
    else:
        work = [(prompt, {}) for prompt in prompts(rounds)]
    for number, (prompt, options) in enumerate([work[0], *work]):
        plain = {**options, "speculation": "off"}
        drafted = {**options, **case.options}
        first, second = (plain, drafted) if number % 2 else (drafted, plain)
        results = {}
        for name, each in (("first", first), ("second", second)):
            results[name] = generate(model, prompt, num_tokens, **each)
        without, with_drafts = (
            (results["first"], results["second"])
            if number % 2
            else (
                results["second"],
                results["first"],
            )
        )
        is_same &= torch.equal(without[0], with_drafts[0])
        if number == 0:  # warms up, and the first trips teach what trips cost
            continue
        off.append(num_tokens / without[1])
        on.append(num_tokens / with_drafts[1])
        ratios.append(without[1] / with_drafts[1])
        num_new += num_tokens - 1
        num_trips += with_drafts[2]
        drafted_s += with_drafts[1]
        away_s += with_drafts[3]
    return Outcome(
        network=network,
        case=case.name,
        off=Spread.of(off),
        on=Spread.of(on),
        ratio=Spread.of(ratios),
        tokens_per_trip=num_new / num_trips,
        beside_trips=1 - away_s / drafted_s,
        is_same=is_same,
        ratio_target=case.lab_target if network != "loopback" else case.loopback_target,
        trip_target=case.trip_target,
    )


@contextmanager
def swarm_model(*, is_lab: bool) -> Iterator[Any]:
    """The demo model behind three servers."""
    with local_swarm.LocalSwarm() as swarm:
        swarm.start_bootstrap(place=place("directory", is_lab))
        edges = local_swarm.spans(8, 3)
        servers = [
            swarm.start_server(DEMO, start, end, place=place(f"server{number}", is_lab))
            for number, (start, end) in enumerate(edges, 1)
        ]
        for server in servers:
            server.wait_for(local_swarm.READY, READY_TIMEOUT_S)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            DEMO, initial_peers=[swarm.address], dtype=torch.float32
        )
        try:
            yield model
        finally:
            model.close()


def run(options: argparse.Namespace, *, is_lab: bool) -> list[Outcome]:
    """Measure all cases on one network."""
    network = "100 ms between hosts" if is_lab else "loopback"
    rounds = options.lab_rounds if is_lab else options.rounds
    num_tokens = options.lab_tokens if is_lab else options.tokens
    with swarm_model(is_lab=is_lab) as model:
        chosen = [case for case in cases() if not is_lab or case.lab_target is not None]
        return [measure(model, network, case, num_tokens, rounds) for case in chosen]


def run_in_lab(arguments: Sequence[str]) -> list[Outcome]:
    """Start this program again on the client's host of a network lab."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        hosts = [f"{host}:{LAB}" for host in LAB_HOSTS]
        tool = Path(__file__).parent / "network_lab.py"
        command = [sys.executable, str(tool), "--hosts", *hosts, "--", sys.executable, __file__, "--in-lab", file.name]
        subprocess.run([*command, *arguments], check=True)
        return [read_outcome(each) for each in json.loads(Path(file.name).read_text())]


def read_outcome(data: dict[str, Any]) -> Outcome:
    """Read what ``asdict`` made."""
    return Outcome(**{**data, **{name: Spread(**data[name]) for name in ("off", "on", "ratio")}})


def report(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print the figures beside their targets."""
    table = Table(
        "network", "case", "off, tokens/s", "with drafts", "ratio", "tokens/trip", "beside trips", "same", "target", ""
    )
    for each in outcomes:
        targets = [f"ratio {each.ratio_target:g}"] if each.ratio_target else []
        targets += [f"tokens/trip {each.trip_target:g}"] if each.trip_target else []
        verdict = "" if not targets else "[green]met[/]" if each.is_met else "[red]missed[/]"
        table.add_row(
            each.network,
            each.case,
            str(each.off),
            str(each.on),
            str(each.ratio),
            f"{each.tokens_per_trip:.2f}",
            f"{each.beside_trips:.1%}",
            "yes" if each.is_same else "[red]no[/]",
            ", ".join(targets),
            verdict,
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="pairs on loopback (default: %(default)s)")
    parser.add_argument("--lab-rounds", type=int, default=5, help="pairs in the lab (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each on loopback (default: %(default)s)")
    parser.add_argument("--lab-tokens", type=int, default=64, help="tokens of each in the lab (default: %(default)s)")
    parser.add_argument("--no-lab", action="store_true", help="loopback alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--in-lab", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with local_swarm.stopping_in_order():
        if options.in_lab:
            options.in_lab.write_text(json.dumps([asdict(each) for each in run(options, is_lab=True)]))
            return 0
        outcomes = run(options, is_lab=False)
        if not options.no_lab:
            outcomes += run_in_lab(sys.argv[1:])
    console = Console(width=None if sys.stdout.isatty() else 160)
    report(console, outcomes)
    console.print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, torch {torch.__version__}; float32, greedy, three "
        f"servers of the demo model; load {os.getloadavg()[0]:.1f}",
        style="dim",
        highlight=False,
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    return 0 if all(each.is_met for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
