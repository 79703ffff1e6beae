"""The examples run, learn through a swarm what a local model learns, and have notebooks of the same cells."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*"),
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run an example's few first steps; returns its names."""

    def run(name: str, steps: int) -> dict[str, Any]:
        arguments = ["--steps", str(steps), "--compare", "--pictures", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        names: dict[str, Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        return names

    return run


def assert_learns_the_same(names: dict[str, Any]) -> None:
    swarm, local = names["losses"]["swarm"], names["losses"]["local"]
    assert swarm == pytest.approx(local, rel=1e-3)
    assert min(swarm[-3:]) < 0.9 * swarm[0]
    assert names["result"] == pytest.approx(names["local"], abs=0.02)


def test_sentiment(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert_learns_the_same(run("sentiment", 12))
    assert (tmp_path / "sentiment" / "model.safetensors").exists()


def test_persona_chat(run: Callable[..., dict[str, Any]]) -> None:
    assert_learns_the_same(run("persona_chat", 8))


def test_lora(run: Callable[..., dict[str, Any]]) -> None:
    names = run("lora", 6)
    assert_learns_the_same(names)
    assert names["served"] == names["result"]


def test_notebooks_are_those_of_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import notebooks  # type: ignore[import-not-found]

    paths = notebooks.scripts()
    assert {path.stem for path in paths} == {"sentiment", "persona_chat", "lora"}
    for path in paths:
        content = json.loads(path.with_suffix(".ipynb").read_text())
        assert content == notebooks.notebook(path.read_text()), "run tools/notebooks.py"
        code = "\n".join("".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code")
        compile(code, path.name, "exec")
