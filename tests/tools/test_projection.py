"""The model of a chain against the published rows, and against what it must do when a network changes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import projection  # noqa: E402


@pytest.mark.parametrize(
    "row", projection.project(0.001, 2.5), ids=lambda each: f"{each.row.network} {each.row.num_cached}"
)
def test_published_rows_come_out(row: projection.Projection) -> None:
    assert abs(row.deviation) <= projection.MAX_DEVIATION
    assert row.modelled < row.ours < row.ours_with_drafts == pytest.approx(2.5 * row.ours)


def test_a_step_is_the_sum_of_its_parts() -> None:
    row = projection.ROWS[0]
    chain = projection.Chain(hop_s=0.01)
    slower = dataclasses.replace(row, round_trip_s=row.round_trip_s + 0.1)
    assert chain.step_s(slower) - chain.step_s(row) == pytest.approx(4 * 0.05)
    assert chain.step_s(row) - projection.Chain(hop_s=0.0).step_s(row) == pytest.approx(0.03)
    assert "PROJECTION" in (TOOLS / "projection.py").read_text()
