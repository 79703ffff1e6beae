"""What the README shows works: its Python runs as it is written, and its commands have the options that it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import petals_client.cli
import petals_dht.cli
import petals_server.cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DEMO = ROOT / "models" / "demo"
APPS: dict[str, Any] = {
    "petals-client": petals_client.cli.app,
    "petals-dht": petals_dht.cli.app,
    "petals-server": petals_server.cli.app,
}


def code_blocks(language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def command_lines() -> Iterator[list[str]]:
    """Every command of ours in the README, without its comment."""
    for block in code_blocks(""):
        for line in block.splitlines():
            words = line.partition(" #")[0].split()
            if words and words[0] in APPS:
                yield words


def test_python_of_the_readme_runs(new_swarm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    swarm = new_swarm()
    swarm.add(DEMO, 0, 8, torch_dtype="bfloat16")
    blocks = list(code_blocks("python"))
    assert len(blocks) >= 2
    for block in blocks:
        code = block.replace('"MODEL"', repr(str(DEMO))).replace("HOST:PORT", swarm.initial_peers[0])
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("words", list(command_lines()), ids=" ".join)
def test_commands_of_the_readme_exist(words: list[str]) -> None:
    program, name, *arguments = words
    commands: dict[str, Any] = typer.main.get_command(APPS[program]).commands  # type: ignore[attr-defined]
    options = {option for parameter in commands[name].params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= options


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_of_the_readme_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
