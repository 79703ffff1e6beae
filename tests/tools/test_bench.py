"""The benchmark suite's plan, figures, reports and conversation with workers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from bench import earlier, report  # noqa: E402
from bench.budget import SWARM_S, WORKER_S, Budget  # noqa: E402
from bench.conversation import Worker, WorkerError  # noqa: E402
from bench.figures import Figure, Spread, short, speed_ratios  # noqa: E402
from bench.plan import HOP_SCENARIOS, LOOPBACK, MODES, NETWORKS, SCENARIOS, Kind, Model, Plan, Unit  # noqa: E402
from bench.run_file import Run, complete  # noqa: E402
from lab.settings import parse_settings  # noqa: E402

PLAN = Plan(
    scenarios=SCENARIOS,
    networks=NETWORKS,
    modes=MODES,
    minutes=1.0,
    most_minutes=2.0,
    min_rounds=1,
    max_rounds=2,
)
TRIPS_S = {"1gbit-5ms": 0.005, "100mbit-5ms": 0.005, "100mbit-100ms": 0.1, "20mbit-40ms": 0.04, "300ms": 0.3}


def figure(network: str = "loopback", mode: str = "petals-1", *values: float, error: str | None = None) -> Figure:
    return Figure(
        network=network,
        scenario="decode",
        mode=mode,
        unit=Unit.RATE,
        values=values,
        reference="local",
        ratios=tuple(value / 10 for value in values) if mode != "local" else (),
        error=error,
    )


FIGURES = (figure("loopback", "local", 10.0, 12.0), figure("loopback", "petals-1", 5.0, 6.0, 9.0, error="a|b"))


def test_networks_have_the_round_trip_and_rate_that_they_are_called_by() -> None:
    assert {network.name for network in NETWORKS if network.host} == set(TRIPS_S)
    for network in NETWORKS:
        if network.host is not None:
            settings = parse_settings(network.host)
            assert 4 * settings.delay_s == pytest.approx(TRIPS_S[network.name])
            rate = network.name.partition("-")[0]
            if "bit" in rate:
                assert settings == parse_settings(f"rate={rate}", settings)


def test_only_swarms_run_where_a_network_makes_a_difference() -> None:
    for cell in PLAN.cells(model=Model.LARGE):
        if cell.scenario.kind == "steps":
            continue
        kinds = {mode.kind for mode in cell.modes}
        if cell.network.name == LOOPBACK:
            assert Kind.LOCAL in kinds
            assert cell.reference.kind is Kind.LOCAL
            alone = cell.scenario.num_clients == 1
            assert (Kind.CPU_OFFLOAD in kinds) is alone
            assert (Kind.DISK_OFFLOAD in kinds) is (alone and cell.scenario.kind != "backward")
        else:
            assert kinds == {Kind.SWARM, Kind.EARLIER}
            assert cell.reference.name == "petals-1"
        assert not any(mode.has_drafts for mode in cell.modes), "random weights would repeat themselves"


def test_a_plan_has_every_scenario_on_every_network_and_smaller_models_where_they_say_most() -> None:
    cells = PLAN.cells()
    large = [each for each in SCENARIOS if each.model is Model.LARGE and each.networks is None]
    assert len(PLAN.cells(model=Model.LARGE)) == len(NETWORKS) * len(large) + 1
    assert [cell.network.name for cell in PLAN.cells(model=Model.THIN)] == [LOOPBACK]
    assert {mode.name for cell in PLAN.cells(model=Model.TEXT) for mode in cell.modes} == {
        *("petals-3", "petals-3-drafts", "earlier-3")
    }
    stages = itertools.product(Model, (False, True))
    parts = [cell for model, is_lab in stages for cell in PLAN.cells(model=model, is_lab=is_lab)]
    assert sorted(map(repr, cells)) == sorted(map(repr, parts))


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5, 1, 3, 2, 4]) == Spread(median=3, low=2, high=4, count=5)
    assert Spread.of([7.0]) == Spread(median=7, low=7, high=7, count=1)


def test_ratios_are_of_the_same_round_and_more_is_faster() -> None:
    assert speed_ratios(Unit.RATE, [4.0, None, 9.0], [2.0, 5.0, 3.0]) == (2.0, 3.0)
    assert speed_ratios(Unit.TIME, [4.0, 1.0], [2.0, None]) == (0.5,)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (1234.5, "1,234"), (0.5, "0.500")],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text


def test_figures_are_read_as_they_are_written() -> None:
    for each in (*FIGURES, figure(error="why")):
        assert Figure.from_json(json.loads(json.dumps(each.as_json()))) == each


def test_a_section_has_every_figure_and_what_went_wrong() -> None:
    text = report.markdown(PLAN, FIGURES, heading="Speed", facts=["a fact"], picture="p.png")
    assert "## Speed\n\n- a fact" in text
    assert "(p.png)" in text
    assert "### loopback" in text
    assert "### 300 ms" not in text, "nothing was measured there"
    assert "| decode, one stream | Transformers, local | 11.0 (10.5 to 11.5) tokens/s | 2 | reference |  |" in text
    assert "| Petals, 1 server | 6.00 (5.50 to 7.50) tokens/s | 3 | 0.600 (0.550 to 0.750) | a\\|b |" in text


def test_pictures_show_what_was_measured(tmp_path: Path) -> None:
    text = report.text_picture(PLAN, FIGURES)
    local, petals = text.splitlines()[1:]
    assert local.count("█") == report.BAR_CELLS
    assert petals.count("█") == round(report.BAR_CELLS * 6 / 11 - 0.5)
    path = tmp_path / "picture.png"
    report.save_picture(path, PLAN, [*FIGURES, figure("300ms", "petals-3", 1.0)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_is_no_picture() -> None:
    assert report.text_picture(PLAN, [figure(error="it failed")]) == ""


def test_projects_are_compared_in_the_rounds_that_both_have() -> None:
    hop = [
        dataclasses.replace(figure("loopback", mode, *values), scenario=HOP_SCENARIOS[0], unit=Unit.STEP)
        for mode, values in HOPS
    ]
    figures = [
        figure("loopback", "petals-3", 8.0, 8.0, 1.0),
        figure("loopback", "earlier-3", 4.0, 2.0, error="it hung"),
        figure("300ms", "petals-3", 3.0),
        figure("300ms", "disk-offload"),
        *hop,
    ]
    ours, theirs = "Petals, 3 servers", "Petals 2.2.0, 3 servers"
    assert report.comparisons(PLAN, figures) == [
        ("loopback", "decode, one stream", ours, theirs, "3.00 (2.50 to 3.50)"),
        ("loopback", "one step, thin model", ours, theirs, "3.25 (2.88 to 3.62)"),
        (
            *("loopback", "added by a hop: one step, thin model", ours, theirs),
            "2.00 (1.50 to 2.50) ms instead of 10.0 (10.0 to 10.0) ms: 5.0 times less",
        ),
    ]
    assert "### Comparisons" in report.markdown(PLAN, figures, heading="a", facts=[], picture=None)
    assert report.comparisons(PLAN, FIGURES) == []


HOPS = (("local", (5.0, 6.0)), ("petals-3", (14.0, 9.0, 1.0)), ("earlier-3", (35.0, 36.0)))


def budget(**changes: int) -> Budget:
    fields = {"end_s": 1000.0, "last_s": 1200.0, "weight_left": 10.0, "num_cells": 2, "swarms_left": 0}
    return Budget(**{**fields, "workers_left": 0, **changes})  # type: ignore[arg-type]


def test_the_time_is_shared_by_weight_and_what_a_cell_leaves_goes_to_those_behind_it() -> None:
    shared = budget()
    assert shared.begin(6.0, now_s=0.0) == 600.0
    assert shared.progress(100.0) == "cell 1 of 2, about 15 min left"
    assert shared.begin(4.0, now_s=100.0) == 900.0
    assert budget().begin(10.0, now_s=2000.0) == 0.0, "a cell begins with one round, however late it is"


def test_time_to_start_processes_is_set_aside() -> None:
    assert budget(swarms_left=10, workers_left=25).begin(5.0, now_s=0.0) == (1000 - 10 * SWARM_S - 25 * WORKER_S) / 2


def test_nothing_begins_or_lasts_longer_when_the_time_is_up() -> None:
    assert [budget().is_late(now_s) for now_s in (1199.0, 1200.0)] == [False, True]
    assert [budget().limit_s(now_s, 60.0) for now_s in (0.0, 1150.0, 1300.0)] == [60.0, 50.0, 1.0]


def test_what_is_claimed_most_of_comes_first_and_gets_more_rounds() -> None:
    labs = [cell for cell in PLAN.cells(model=Model.LARGE, is_lab=True) if cell.scenario.name == "decode"]
    assert labs[0].network.name == "100mbit-100ms"
    assert labs[0].weight > labs[1].weight
    assert len(labs) == len(NETWORKS) - 1


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    figures = (*FIGURES, figure("300ms", error="the time was up"))
    Run(plan=PLAN, facts=("a fact",), figures=figures).write(path)
    read = Run.read(path)
    assert read.figures == figures
    assert complete(read.figures) == FIGURES
    rest = dataclasses.replace(PLAN, done=frozenset((each.network, each.scenario) for each in FIGURES))
    assert len(rest.cells()) == len(PLAN.cells()) - 1
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no figures"):
        Run.read(path)


def test_a_hub_entry_is_what_the_earlier_one_reads(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "rope_parameters": {}}))
    hub = earlier.make_hub(model, tmp_path / "hub" / "hub")
    entry = hub / "models--bench--llama"
    snapshot = entry / "snapshots" / (entry / "refs" / "main").read_text()
    assert (snapshot / "model.safetensors").read_bytes() == b"weights"
    config = json.loads((snapshot / "config.json").read_text())
    assert config["hidden_size"] == 8
    assert "rope_parameters" not in config
    command = earlier.server_command(
        Path("python"), hub, (0, 4), None, host="10.0.0.3", port=31331, identity=tmp_path / "key"
    )
    assert "--new_swarm" in command
    assert "/ip4/10.0.0.3/tcp/31331" in command
    assert earlier.address_pattern("10.0.0.3").search("at /ip4/10.0.0.3/tcp/31330/p2p/Qm1 now")


WORKER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from bench import conversation

def start():
    print("libraries print what they like")
    if sys.argv[2] == "fail":
        raise OSError("no model")
    def answer(request):
        if request["do"] == "raise":
            raise ValueError("first line\\nsecond line")
        if request["do"] == "end":
            print("the reason", file=sys.stderr, flush=True)
            os._exit(3)
        if request["do"] == "hang":
            sys.stdin.read()
        return {"value": request["do"]}
    return answer

conversation.answer(start)
"""


def worker(how: str = "well") -> Worker:
    return Worker("test", [sys.executable, "-c", WORKER, str(TOOLS), how])


def test_a_worker_answers_and_goes_on_after_an_error() -> None:
    asked = worker()
    assert asked.receive(30) == {}
    assert asked.ask({"do": "x" * 100_000}, 30) == {"value": "x" * 100_000}
    with pytest.raises(WorkerError, match=r"^first line$"):
        asked.ask({"do": "raise"}, 30)
    assert asked.ask({"do": "it"}, 30) == {"value": "it"}
    asked.stop()


@pytest.mark.parametrize(("do", "complaint"), [("end", "it ended with 3: the reason"), ("hang", "no answer in 0 s")])
def test_a_worker_that_ends_or_hangs_is_reported(do: str, complaint: str) -> None:
    asked = worker()
    asked.receive(30)
    with pytest.raises(WorkerError, match=complaint):
        asked.ask({"do": do}, 0.2 if do == "hang" else 30)
    asked.stop()


def test_a_worker_that_can_not_start_says_why() -> None:
    asked = worker("fail")
    with pytest.raises(WorkerError, match="no model"):
        asked.receive(30)
    asked.stop()


def test_a_file_is_drawn_again(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    names = {"scenarios": SCENARIOS, "networks": NETWORKS, "modes": MODES}
    document = {name: [each.name for each in values] for name, values in names.items()}
    path.write_text(json.dumps({**document, "facts": ["a fact"], "figures": [each.as_json() for each in FIGURES]}))
    script = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); from bench.__main__ import main; raise SystemExit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--from-json", str(path), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a fact" in done.stdout
    section = (tmp_path / "benchmarks.md").read_text()
    assert "- a fact" in section
    assert "6.00 (5.50 to 7.50)" in section
    assert (tmp_path / "benchmarks.png").exists()
