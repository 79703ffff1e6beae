"""A small swarm in simulated time. ``tools/simulate.py`` runs large ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from petals_server.placement.moves import MoveRules
from simulator import report
from simulator.policies import Earlier, Policy, Product
from simulator.report import Outcome
from simulator.world import HOUR_S, Settings, World

SETTINGS = Settings(num_servers=150, num_blocks=40, hours=1.0, churn_per_hour=0.2, seed=3)


def simulate(policy: Policy, settings: Settings = SETTINGS, num_sessions: int = 4) -> Outcome:
    return report.run(World(settings, policy), num_sessions)


def test_a_swarm_keeps_itself_balanced_and_recovers() -> None:
    ours, earlier = simulate(Product(MoveRules())), simulate(Earlier())
    assert ours.mean_share > max(0.84, earlier.mean_share + 0.05)
    assert ours.dark_block_s == 0
    assert ours.dark_block_s_after == 0
    assert 0 < ours.moves_per_4h < 4
    assert max(ours.max_moving_share, ours.max_moving_share_after) <= 0.05
    assert ours.num_plans > 0
    assert ours.stalled_s == 0


def test_equal_seeds_give_equal_runs() -> None:
    settings = Settings(num_servers=40, num_blocks=20, hours=0.5, churn_per_hour=0.5, seed=5)
    first, second = simulate(Product(MoveRules()), settings), simulate(Product(MoveRules()), settings)
    assert first.samples == second.samples
    assert first.route_s == second.route_s


def test_dark_blocks_are_lit_again() -> None:
    world = World(Settings(num_servers=40, num_blocks=80, hours=1.0, churn_per_hour=0.0, seed=1), Product(MoveRules()))
    world.populate()
    for server in [server for server in world.servers.values() if server.start <= 10 < server.end]:
        world._leave(server, crashes=True)
    assert world.truth.is_dark.any()
    world.run(HOUR_S)
    assert not world.truth.is_dark.any()


def test_liars_gain_little() -> None:
    settings = Settings(num_servers=150, num_blocks=40, hours=1.0, churn_per_hour=0.2, liar_share=0.1, seed=3)
    ours, earlier = simulate(Product(MoveRules()), settings, 0), simulate(Earlier(), settings, 0)
    assert ours.mean_share > earlier.mean_share + 0.03


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = simulate(Product(MoveRules()), Settings(num_servers=20, num_blocks=8, hours=0.2), 2)
    report.draw([outcome], tmp_path / "run.png", "small")
    assert (tmp_path / "run.png").stat().st_size > 10_000
