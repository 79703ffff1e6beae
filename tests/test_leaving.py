"""How a server leaves when it is told to: a signal lets sessions end, a second one does not wait for them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from petals_client import AutoDistributedModelForCausalLM

TOKENS = torch.tensor([[3, 4, 5]])


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process, ready, and its address."""
    command = [sys.executable, "-m", "petals_server", "serve", str(folder), "--new-swarm", "--host", "127.0.0.1"]
    options = ["--port", "0", "--threads", "1", "--torch-dtype", "float32"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split()[-1]
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"the server did not say {text!r}")


@pytest.mark.parametrize("is_patient", [True, False], ids=["drains", "leaves-at-once"])
def test_signals(is_patient: bool, checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints("llama")
    with serving(folder) as (process, address):
        model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[address])
        with model.inference_session(max_length=16) as session, torch.no_grad():
            model(TOKENS)
            process.send_signal(signal.SIGINT)
            read_until(process, "1 open session(s) may end")
            model(TOKENS)  # the session goes on
            assert session.position == 6
            if not is_patient:
                process.send_signal(signal.SIGINT)
                assert process.wait() == 130
        assert process.wait() == (0 if is_patient else 130)
        model.close()
