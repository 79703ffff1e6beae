import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

ADDRESS = "127.0.0.1:1"


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "petals_server", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["/no/such/folder", "--new-swarm"], "/no/such/folder is not a checkpoint"),
        (["model", "--new-swarm", "--initial-peers", ADDRESS], "either --new-swarm.* or --initial-peers"),
        (["model", "--initial_peers", "nowhere"], "'nowhere' is not an address: expected HOST:PORT"),
    ],
)
def test_errors_take_one_line(arguments: list[str], text: str) -> None:
    with start(["serve", *arguments]) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")

    assert re.search(text, errors), errors


def test_without_arguments_there_is_help() -> None:
    with start([]) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("Usage: ")
    assert errors.count("\n") > 5


def test_version() -> None:
    with start(["--version"]) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith(f"petals-server {version('petals-server')} (Python ")


def test_help_shows_no_names_of_earlier_versions() -> None:
    with start(["serve", "--help"]) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--num-blocks" in output
    assert "num_blocks" not in output
    assert "Servers can read what passes through them." in " ".join(output.split())


def test_a_server_says_where_to_join_and_leaves_when_asked_to(checkpoint: Path) -> None:
    with start(["serve", str(checkpoint), "--new-swarm", "--port", "0", "--threads", "1"]) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    start_of_line = f"serving {checkpoint.name} blocks 0:4 · join with --initial-peers 127.0.0.1:"
    assert line.startswith(start_of_line)
    assert line.removeprefix(start_of_line).strip().isdecimal()
    assert output == ""
    assert len(errors.splitlines()) <= 12
    assert "can read whatever passes through it" in errors
