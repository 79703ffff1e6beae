"""Wrong usage of the command is told in one line, with code 2, before anything heavy is imported."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "petals_client", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "model", "text", "--initial-peers", "nowhere"], "'nowhere' is not an address"),
        (["generate", "model", "text", "--initial-peers", "0.0.0.0:1"], "nobody can connect to a wildcard"),
        (["chat", "model"], "--initial-peers"),
        (
            ["generate", "model", "text", "--initial-peers", "h:1", "--torch-dtype", "int3"],
            "int3: choose",
        ),
        (["generate", "model", "text", "--initial-peers", "h:1", "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(
        f"petals-client {version('petals-client')} (Python {platform.python_version()}, torch "
    )


def test_help() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "Use a language model that a swarm of servers runs." in result.stdout
    for command in ("generate", "chat", "status"):
        assert command in result.stdout
