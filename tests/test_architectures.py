"""Every architecture: the swarm gives what the local model gives. ``tools/architectures.py`` prints it as a table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from petals_core.testing.factories import FAMILIES

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance", TOOLS / "conformance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_a_swarm_is_the_local_model(family: str, conformance: ModuleType, tmp_path: Path) -> None:
    outcome = conformance.check(family, tmp_path / f"tiny-{family}")
    assert outcome.is_exact, outcome
