"""A short run of the fuzzer; ``tools/fuzz_protocol.py`` does long ones."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from petals_core.wire import messages

TOOL = Path(__file__).parents[2] / "tools" / "fuzz_protocol.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_protocol", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_kind_of_message_is_mutated() -> None:
    assert set(messages._KINDS) == load().KINDS


def test_mutated_input_raises_only_documented_errors_and_gets_behind_the_framing() -> None:
    fuzz = load()
    report = fuzz.run(5_000, seed=0)
    assert report.failures == []
    assert report.inputs.total() == 5_000
    for target in fuzz.TARGETS:
        assert report.reach(target) >= 0.3, target
        outcomes = [outcome for name, outcome in report.outcomes if name == target]
        assert "accepted" in outcomes
        assert len(outcomes) > 1, "nothing was refused"


def test_the_same_seed_gives_the_same_outcomes() -> None:
    fuzz = load()
    assert fuzz.run_chunk(3, 1, 200).outcomes == fuzz.run_chunk(3, 1, 200).outcomes
    assert fuzz.run_chunk(3, 1, 200).outcomes != fuzz.run_chunk(4, 1, 200).outcomes
