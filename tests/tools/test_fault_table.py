"""Some cells of the fault table with real processes; ``tools/fault_table.py`` runs all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from fault_run import FAULTS, MOMENTS, TARGETS, Cell, FaultLab, cells

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture(scope="module")
def lab() -> Iterator[FaultLab]:
    with FaultLab() as started:
        yield started


@pytest.mark.parametrize(
    ("fault", "target", "moment"),
    [
        ("kill -9", "middle", "step 20"),
        ("kill -9", "two", "truncate"),
        ("SIGSTOP", "last", "step 1"),
        ("corrupt", "last", "step 1"),
        ("restart", "first", "between"),
        ("drain", "middle", "step 1"),
    ],
)
def test_the_outcome_is_as_if_nothing_had_happened(lab: FaultLab, fault: str, target: str, moment: str) -> None:
    assert lab.run(Cell(fault=fault, target=target, moment=moment)).problems == ()


def test_the_table_is_complete() -> None:
    assert len(list(cells(FAULTS, TARGETS, MOMENTS))) == 8 * 4 * 5
