"""Every architecture: the swarm gives what the local model gives. ``tools/architectures.py`` prints it as a table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "qwen3_next"])
def test_hybrids_follow_beams(family: str, pairs: Any) -> None:
    pair = pairs(family)
    tokens = torch.randint(3, 259, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    tokens *= mask
    options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    actual, expected = (each.generate(tokens, attention_mask=mask, **options) for each in pair.both)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", ["bamba", "qwen3_next"])
def test_hybrids_go_back_in_a_session(family: str, pairs: Any) -> None:
    pair = pairs(family)
    first, second = (
        torch.randint(3, 259, (2, width), generator=torch.Generator().manual_seed(width)) for width in (9, 3)
    )
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with pair.model.inference_session(max_length=64) as session:
        pair.model.generate(first, **options)
        session.truncate(5)
        actual = pair.model.generate(second, **options)
    assert torch.equal(actual, pair.local.generate(torch.cat([first[:, :5], second], dim=1), **options)[:, 5:])
