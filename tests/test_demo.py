"""The demo as its user runs it: separate processes through public commands, and nothing left of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARK = "PETALS_TEST_MARK"

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc")


@pytest.fixture
def mark() -> str:
    """A value that every process of the demo inherits in its environment."""
    return uuid.uuid4().hex


def demo(mark: str, *options: str) -> subprocess.Popen[str]:
    """Start the demo in this environment, without making sure that it is up to date."""
    variables = {**os.environ, MARK: mark, "PETALS_ENVIRONMENT_READY": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), *options]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left_behind(mark: str) -> Iterator[str]:
    """Command lines of the processes that carry the mark."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # ended, or not ours
            continue


def test_demo_says_that_the_tokens_are_identical_and_leaves_nothing(mark: str) -> None:
    with demo(mark, "--max-new-tokens", "24", "--servers", "2") as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "identical: the same 24 tokens" in output
    assert "tokens/s through 2 servers" in output
    assert list(left_behind(mark)) == []


def test_interrupted_demo_leaves_nothing(mark: str) -> None:
    with demo(mark) as process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if re.search("bootstrap at", line):  # the servers are about to load
                break
        assert sum("petals-server" in command for command in left_behind(mark)) == 3, seen
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
    assert process.returncode == 130, output
    assert list(left_behind(mark)) == []


def test_demo_explains_what_it_can_not_do(mark: str, tmp_path: Path) -> None:
    with demo(mark, "--model", str(tmp_path / "missing")) as process:
        output, _ = process.communicate()
    assert process.returncode == 2
    assert [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    assert list(left_behind(mark)) == []
