"""What README and guides show works: their Python runs as it is written, and their commands have the options named."""

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
DOCUMENTS = ("README.md", "docs/client.md", "docs/quantization.md")
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
DEMO = ROOT / "models" / "demo"
APPS: dict[str, Any] = {
    "petals-client": petals_client.cli.app,
    "petals-dht": petals_dht.cli.app,
    "petals-server": petals_server.cli.app,
}


def code_blocks(document: str, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[document], re.MULTILINE | re.DOTALL)


def command_lines() -> Iterator[list[str]]:
    """Every command of ours in the documents, without its comment."""
    for document in DOCUMENTS:
        for block in code_blocks(document, ""):
            for line in block.splitlines():
                words = line.partition(" #")[0].split()
                if words and words[0] in APPS:
                    yield words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_runs(new_swarm: Any, document: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Block after block, so that a later one may use what earlier ones made."""
    swarm = new_swarm()
    swarm.add(DEMO, 0, 8, torch_dtype="bfloat16")
    blocks = list(code_blocks(document, "python"))
    assert len(blocks) >= 2
    names = {"__name__": "document"}
    for block in blocks:
        code = block.replace('"MODEL"', repr(str(DEMO))).replace('"DRAFT_MODEL"', repr(f"{DEMO}-draft"))
        code = code.replace("HOST:PORT", swarm.initial_peers[0])
        exec(compile(code, document, "exec"), names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("words", list(command_lines()), ids=" ".join)
def test_commands_exist(words: list[str]) -> None:
    program, name, *arguments = words
    commands: dict[str, Any] = typer.main.get_command(APPS[program]).commands  # type: ignore[attr-defined]
    options = {option for parameter in commands[name].params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= options


def links() -> Iterator[tuple[str, str]]:
    """Relative links outside of code."""
    for document, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", prose))):
            yield document, target


@pytest.mark.parametrize(("document", "target"), list(links()))
def test_links_lead_somewhere(document: str, target: str) -> None:
    assert ((ROOT / document).parent / target).exists()


def test_modules_that_documents_name_exist() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "packages").glob("*/README.md")]
    folders = [ROOT / name for name in ("packages", "tools", "tests", "examples", ".ci")]
    files = {f"/{path.relative_to(ROOT)}" for folder in folders for path in folder.rglob("*") if path.is_file()}
    named = {(path.name, name) for path in documents for name in re.findall(r"`([\w./-]+\.py)`", path.read_text())}
    assert len(named) > 100
    assert [each for each in sorted(named) if not any(file.endswith(f"/{each[1]}") for file in files)] == []
