"""Measure ways of running a model, on several networks: ``python3 tools/bench [--quick] [--output FOLDER]``.

Prints tables and writes ``benchmarks.json``, ``benchmarks.png`` and ``benchmarks.md`` into the folder. Every figure is
a median with its quartiles; ratios are of rounds in which the modes take turns. Networks other than loopback need the
network lab (docs/network-lab.md). The JSON file is written after every cell: ``--from-json FILE`` draws the tables and
the picture of one, also of a run that was cut off, and ``--resume FILE`` measures what it lacks.
"""

from __future__ import annotations

import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))

import os

import environment
from lab import sandbox

if __name__ == "__main__" and sandbox.FOLDER_VARIABLE not in os.environ:
    environment.enter("--all-groups")

import argparse
import dataclasses
import platform
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence

from rich.console import Console

import local_swarm
from bench import report
from bench.plan import LOOPBACK, MODES, NETWORKS, QUICK_MODES, QUICK_NETWORKS, QUICK_SCENARIOS, SCENARIOS, Model, Plan
from bench.run_file import Run, complete
from bench.suite import LAB_HOSTS, Checkpoint, Suite

FULL_MINUTES, QUICK_MINUTES = (32.0, 37.0), (3.7, 4.4)
"""When the time that cells share ends, and when nothing more is begun. The rest of 40 and 5 minutes is for what is
under way then, for stopping and for the picture."""
FULL_ROUNDS, QUICK_ROUNDS = (4, 15), (1, 5)
FULL_TIMEOUT_S, QUICK_TIMEOUT_S = 60.0, 25.0
TEXT_ROUNDS = 15
_LAB_TRIED = "PETALS_BENCH_NO_LAB"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer scenarios, networks and rounds")
    parser.add_argument("--scenarios", nargs="+", choices=[each.name for each in SCENARIOS], help="default: all")
    parser.add_argument("--networks", nargs="+", choices=[each.name for each in NETWORKS], help="default: all")
    parser.add_argument("--modes", nargs="+", choices=[each.name for each in MODES], help="default: all")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"that measuring aims at; at most a fifth more ({FULL_MINUTES[0]:g}; quick: {QUICK_MINUTES[0]:g})",
    )
    parser.add_argument("--rounds", type=int, nargs=2, metavar=("LEAST", "MOST"), help="of each cell")
    parser.add_argument(
        "--timeout",
        type=float,
        help=f"seconds of a mode for one round ({FULL_TIMEOUT_S:g}; quick: {QUICK_TIMEOUT_S:g})",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks"), help="folder for results (default: %(default)s)"
    )
    parser.add_argument("--resume", type=Path, metavar="JSON", help="measure what these results lack")
    parser.add_argument("--from-json", type=Path, metavar="JSON", help="measure nothing: draw these results")
    return parser.parse_args(argv)


def make_plan(options: argparse.Namespace, before: Run | None) -> Plan:
    """Choose what the options ask for, in the suite's own order, but for what a run before has measured."""
    scenarios = options.scenarios or (QUICK_SCENARIOS if options.quick else [each.name for each in SCENARIOS])
    networks = options.networks or (QUICK_NETWORKS if options.quick else [each.name for each in NETWORKS])
    modes = options.modes or (QUICK_MODES if options.quick else [each.name for each in MODES])
    least, most = options.rounds or (QUICK_ROUNDS if options.quick else FULL_ROUNDS)
    minutes, most_minutes = QUICK_MINUTES if options.quick else FULL_MINUTES
    if options.minutes:
        minutes, most_minutes = options.minutes, 1.2 * options.minutes
    chosen = [each for each in SCENARIOS if each.name in scenarios]
    if options.quick and not options.networks:  # servers of one model in the lab are enough
        chosen = [each if each.networks else dataclasses.replace(each, networks=(LOOPBACK,)) for each in chosen]
    return Plan(
        scenarios=chosen,
        networks=[each for each in NETWORKS if each.name in networks],
        modes=[each for each in MODES if each.name in modes],
        minutes=minutes,
        most_minutes=most_minutes,
        min_rounds=least,
        max_rounds=most,
        done=frozenset((each.network, each.scenario) for each in (before.figures if before else ())),
    )


def enter_lab(plan: Plan) -> None:
    """Start this program again in a network lab, if it has to measure on one and can have one."""
    needs_lab = any(network.host is not None for network in plan.networks)
    if not needs_lab or sandbox.FOLDER_VARIABLE in os.environ or _LAB_TRIED in os.environ:
        return
    if obstacle := sandbox.obstacle():
        os.environ[_LAB_TRIED] = obstacle
        return
    lab = [sys.executable, str(TOOLS / "network_lab.py"), "--hosts", *LAB_HOSTS, "--on", sandbox.OUTSIDE, "--"]
    sys.stdout.flush()
    os.execv(sys.executable, [*lab, sys.executable, *sys.argv])


def measure(
    plan: Plan, options: argparse.Namespace, console: Console, before: Run | None, save: Callable[[Run], None]
) -> Run:
    """Run the plan; ``save`` gets what is there whenever a cell is done."""
    from bench import text
    from petals_core.testing import factories

    started_s = time.time()
    say: Callable[[str], None] = lambda line: console.print(  # noqa: E731
        f"  {time.time() - started_s:4.0f} s  {line}", style="dim", markup=False
    )
    if _LAB_TRIED in os.environ:
        console.print(f"no network lab here: {os.environ[_LAB_TRIED]}", style="yellow")
    with tempfile.TemporaryDirectory(prefix="petals-bench-", ignore_cleanup_errors=True) as temporary:
        os.environ["PETALS_CACHE_DIR"] = os.environ["PETALS_DATA_DIR"] = temporary
        scratch = Path(temporary)
        folders = {
            Model.LARGE: factories.bench_model(scratch / "bench"),
            Model.THIN: _thin_model(scratch / "thin"),
            Model.TEXT: text.DEMO,
        }
        models = {model: _checkpoint(model, folder, scratch) for model, folder in folders.items()}
        can_lab = sandbox.FOLDER_VARIABLE in os.environ
        reachable = [network for network in plan.networks if network.host is None or can_lab]
        suite = Suite(
            dataclasses.replace(plan, networks=reachable),
            models,
            scratch,
            timeout_s=options.timeout or (QUICK_TIMEOUT_S if options.quick else FULL_TIMEOUT_S),
            say=say,
        )
        names = {each.name for each in plan.scenarios} | {each.name for each in plan.networks}
        names |= {each.name for each in plan.modes}
        known = before.figures if before else ()
        figures = [each for each in known if names.issuperset((each.scenario, each.network, each.mode))]

        def so_far() -> Run:
            facts = [*_facts(started_s), *(checkpoint.title for checkpoint in models.values()), *suite.notes]
            if missing := [network.title for network in plan.networks if network not in reachable]:
                reason = os.environ.get(_LAB_TRIED, "")
                facts.append(f"not measured, because there is no network lab: {'; '.join(missing)} ({reason})")
            facts += [f"resumed; the run before: {fact}" for fact in (before.facts[:2] if before else ())]
            return Run(plan=plan, facts=tuple(facts), figures=tuple(figures))

        try:
            for figure in suite.run():
                figures.append(figure)
                save(so_far())
        except KeyboardInterrupt:
            if not any(figure.values for figure in figures):
                raise
            suite.notes.append("interrupted: what was measured until then is here, and the rest is missing")
        except Exception as error:  # what was measured is worth a table all the same
            suite.notes.append(f"ended early: {type(error).__name__}: {error}".partition("\n")[0])
            say(suite.notes[-1])
        return so_far()


def _facts(started_s: float) -> list[str]:
    """What was run when, for how long, and where."""
    import torch
    import transformers

    return [
        f"`python3 tools/bench {shlex.join(sys.argv[1:])}`".replace(" `", "`"),
        f"{time.strftime('%Y-%m-%d', time.gmtime(started_s))}, {(time.time() - started_s) / 60:.0f} minutes, "
        f"load {os.getloadavg()[0]:.1f} at the end",
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        f"Python {platform.python_version()}, torch {torch.__version__}, Transformers {transformers.__version__}; "
        "float32, greedy, speculation off but where drafts are said to be",
    ]


def _thin_model(folder: Path) -> Path:
    """As many blocks as the bench model, and so little in them that reading the weights is a small part of a step.

    Heads of one size and states as wide as all of them, because Petals 2.2.0 knows no others.
    """
    from petals_core.testing import factories

    return factories.make_checkpoint(
        folder,
        num_blocks=12,
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        intermediate_size=16,
        max_position_embeddings=4096,
    )


def _checkpoint(model: Model, folder: Path, scratch: Path) -> Checkpoint:
    """A model as the suite needs it."""
    import transformers

    from bench import text

    config = transformers.AutoConfig.from_pretrained(folder)
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (tokens,) = {each.prompt_tokens for each in SCENARIOS if each.model is Model.TEXT}
    return Checkpoint(
        title=f"{model} model: {config.num_hidden_layers} blocks of width {config.hidden_size}, MLP of "
        f"{config.intermediate_size}, {weight_bytes / 1e6:.0f} MB stored",
        folder=folder,
        num_blocks=config.num_hidden_layers,
        weight_bytes=weight_bytes,
        hub=scratch / f"hub-{model}" / "hub",
        prompts=text.beginnings(TEXT_ROUNDS, tokens) if model is Model.TEXT else None,
        variables={} if model is Model.LARGE else {"OMP_NUM_THREADS": "1"},  # as servers choose for small ones
    )


def section(run: Run, picture: str | None) -> str:
    """The run as a section of a document."""
    return report.markdown(run.plan, run.figures, heading="Ways of running a model", facts=run.facts, picture=picture)


def publish(run: Run, console: Console, folder: Path) -> None:
    """Print a run's tables and write its section and its picture."""
    report.print_tables(console, run.plan, run.figures)
    for fact in run.facts:
        console.print(fact, style="dim", markup=False)
    (folder / "benchmarks.md").write_text(section(run, "benchmarks.png"))
    report.save_picture(folder / "benchmarks.png", run.plan, run.figures)
    console.print(f"written: {folder}/benchmarks.json, .md and .png")


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        known = Run.read(options.from_json or options.resume) if options.from_json or options.resume else None
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    path = options.output / "benchmarks.json"
    if options.from_json:
        assert known is not None
        run = known
        options.output.mkdir(parents=True, exist_ok=True)
    else:
        before = dataclasses.replace(known, figures=complete(known.figures)) if known else None
        plan = make_plan(options, before)
        enter_lab(plan)
        options.output.mkdir(parents=True, exist_ok=True)
        try:
            with local_swarm.stopping_in_order():
                run = measure(plan, options, console, before, lambda run: run.write(path))
        except KeyboardInterrupt:
            console.print("interrupted")
            return 130
    run.write(path)
    publish(run, console, options.output)
    return 0 if any(figure.values for figure in run.figures) else 1


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
