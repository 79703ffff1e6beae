"""A program that is asked on standard input and answers on standard output, one line of JSON each.

Needs the standard library alone, so that workers of other environments can use it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_STOP_TIMEOUT_S = 10.0
_MAX_ERROR_CHARACTERS = 300


class WorkerError(Exception):
    """A worker failed, ended, or took too long."""


class Worker:
    """A process that is asked one thing at a time."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by ``stop``
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, **(variables or {})},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._received = b""
        self._is_busy = True  # until it has said that it is ready

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises:
            WorkerError: it reports an error, has ended, or does not answer in time (and is stopped then).
        """
        assert self._process.stdin is not None
        self._is_busy = True
        with contextlib.suppress(BrokenPipeError):  # the answer will say why
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return self.receive(timeout_s)

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the next answer; ``ask`` says what it raises."""
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            assert self._process.stdout is not None
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    self.stop(0)
                    raise WorkerError(f"no answer in {timeout_s:.0f} s")
                if not selector.select(left_s):
                    continue
                chunk = self._process.stdout.read(65536)
                if chunk == b"":
                    raise WorkerError(self._epitaph(self._process.wait()))
                self._received += chunk or b""
        line, _, self._received = self._received.partition(b"\n")
        self._is_busy = False
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def stop(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """End the process and everything that it started; one that is at work is not waited for."""
        if self._complaints.closed:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._is_busy else timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    def _epitaph(self, code: int) -> str:
        """Why the process has ended; the kernel kills one that its memory limit is too small for."""
        if code == -signal.SIGKILL:
            return "it was killed, as happens where memory doesn't suffice"
        self._complaints.seek(0)
        lines = [line.strip() for line in self._complaints.read()[-10_000:].splitlines() if line.strip()]
        return f"it ended with {code}: {lines[-1][:_MAX_ERROR_CHARACTERS] if lines else 'it said nothing'}"


def answer(start: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Be a worker: ``start`` prepares, what it returns answers each request, until standard input ends.

    Standard output becomes standard error for everybody else, since libraries print what they like.
    """
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)

        def attempt(action: Callable[[], dict[str, Any]]) -> None:
            try:
                reply = action()
            except Exception as error:
                import traceback

                traceback.print_exc()
                text = str(error).partition("\n")[0] or type(error).__name__
                reply = {"error": text[:_MAX_ERROR_CHARACTERS]}
            output.write(json.dumps(reply) + "\n")
            output.flush()

        handlers: list[Callable[[dict[str, Any]], dict[str, Any]]] = []

        def prepare() -> dict[str, Any]:
            handlers.append(start())
            return {}

        attempt(prepare)
        for line in sys.stdin if handlers else ():
            request = json.loads(line)
            attempt(lambda: handlers[0](request))  # noqa: B023 - called at once
