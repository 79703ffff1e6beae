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


@pytest.mark.parametrize(
    "row", projection.project_forwards(0.001), ids=lambda each: f"{each.row.network} {each.row.num_rows} rows"
)
def test_published_forwards_come_out(row: projection.ForwardProjection) -> None:
    assert abs(row.deviation) <= projection.MAX_DEVIATION
    assert row.ours < row.ours_in_int8


def test_a_forward_around_the_ring_takes_its_slowest_stage_for_each_part() -> None:
    forward = projection.Forward(state_bytes=2, window_bytes=projection.OWN_WINDOW_BYTES)
    few, many = projection.FORWARD_ROWS[1], projection.FORWARD_ROWS[4]
    assert 3 * projection.micro_batch_s(128) < forward.ring_s(few) < forward.forward_s(few)
    around_s = forward.ring_s(many)
    assert 18 * projection.micro_batch_s(512) < around_s < forward.forward_s(many)
    assert projection.micro_batch_s(128) == pytest.approx(projection.FORWARD_S[1])
    assert projection.micro_batch_s(1024) == pytest.approx(projection.FORWARD_S[64])
    narrow = dataclasses.replace(many, rate_bits_per_s=1e7)
    link_s = 8 * 512 * projection.HIDDEN_SIZE * 2 / 1e7
    assert forward.ring_s(narrow) == pytest.approx(19 * link_s + 3 * projection.micro_batch_s(512), rel=0.01)


def test_a_transfer_grows_its_window_with_every_round_trip() -> None:
    slow = projection.FORWARD_ROWS[2]
    forward = projection.Forward(state_bytes=1, window_bytes=10 * projection.FIRST_WINDOW_BYTES)
    first = projection.FIRST_WINDOW_BYTES
    assert forward.transfer_s(slow, first) == pytest.approx(0.05 + first * 8 / 1e8)
    assert forward.transfer_s(slow, 3 * first) == pytest.approx(0.05 + 0.1 + 2 * first * 8 / 1e8)
    assert forward.transfer_s(slow, 35 * first) == pytest.approx(0.05 + 0.5 + 10 * first * 8 / 1e8), "1 2 4 8 10 10"
