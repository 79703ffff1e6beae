"""A short soak: real processes are killed and started again while a client generates."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from soak_run import NUM_COPIES, SPANS, Outcome, Settings, format_outcome, run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_generations_do_not_change_while_servers_are_killed() -> None:
    outcome = run(
        Settings(seed=0, num_generations=12, num_tokens=24, kill_every_s=0.3, restart_after_s=0.1, waits_for_all=True)
    )
    assert outcome.is_good, format_outcome(outcome)
    assert outcome.num_identical == 12
    assert outcome.num_kills > 0


def test_every_block_is_held_twice() -> None:
    held = [block for start, end in SPANS * NUM_COPIES for block in range(start, end)]
    assert sorted(held) == sorted([*range(6)] * 2)


def test_what_is_no_success() -> None:
    assert Outcome(num_identical=2).is_good
    assert not Outcome(num_identical=2, different=[1]).is_good
    assert not Outcome(num_identical=2, failed=["generation 1: lost"]).is_good
    assert not Outcome(num_identical=2, sessions_left=1).is_good
    text = format_outcome(Outcome(num_identical=1, failed=["generation 1: lost"], token_s=[0.01, 0.2], num_kills=3))
    assert "1 of 2 generations identical" in text
    assert "3 kills" in text
    assert "1 over 0.1 s" in text
    assert "generation 1: lost" in text
