"""A swarm of separate processes on this machine, started through the public commands and stopped without remains.

Needs the standard library and a POSIX system. The processes listen on the loopback interface, or on hosts of the
network lab, at ports that the system chooses, keep their keys in a temporary folder, and each leads a process group of
its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

HOST = "127.0.0.1"
READY = re.compile(r"^serving ")
"""The line by which a server says that clients can use it."""
_WAITS = re.compile(r"^waiting$")
_THEN_WAIT = "\nprint('waiting', flush=True)\nimport signal\nsignal.pause()"
_STOP_TIMEOUT_S = 10.0
_TAIL_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process of a swarm runs and listens."""

    host: str = HOST
    prefix: tuple[str, ...] = ()
    """What is written before a command, so that it runs there."""


LOOPBACK = Place()


class ProcessError(Exception):
    """A process of the swarm ended, or did not say in time what was waited for; the text holds its last lines."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line that a process printed, on standard output or standard error."""

    time_s: float
    """On the clock of ``time.monotonic``."""
    text: str


class Process:
    """A running command whose output is collected."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.name = name
        self.started_s = time.monotonic()
        self.lines: list[Line] = []
        self._changed = threading.Condition()
        self._ended = False
        self._interrupted = False
        self._stopped = False
        # A session of its own: Ctrl-C in the terminal reaches the tool alone, which then stops everything in order.
        self.popen = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def group_is_alive(self) -> bool:
        """Whether the process, or one that it started, still runs."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # the number has gone to somebody else
            return False
        return True

    def wait_for(self, pattern: re.Pattern[str], timeout_s: float) -> tuple[Line, re.Match[str]]:
        """Return the first line in which ``pattern`` is found.

        Raises:
            ProcessError: the process ended first, or ``timeout_s`` passed.
        """
        deadline_s = time.monotonic() + timeout_s
        seen = 0
        with self._changed:
            while True:
                for line in self.lines[seen:]:
                    if match := pattern.search(line.text):
                        return line, match
                seen = len(self.lines)
                if self._ended:
                    raise ProcessError(f"{self.name} ended with exit code {self.popen.wait()}{self._tail()}")
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise ProcessError(f"{self.name} was not ready after {timeout_s:.0f} s{self._tail()}")
                self._changed.wait(left_s)

    def check(self) -> None:
        """See that the process still runs.

        Raises:
            ProcessError: it has ended.
        """
        if (code := self.popen.poll()) is not None:
            self._reader.join(1)
            raise ProcessError(f"{self.name} ended with exit code {code}{self._tail()}")

    def interrupt(self) -> None:
        """Ask the process to stop, as Ctrl-C does; a second time would mean at once."""
        if not self._interrupted:
            self._interrupted = True
            self._signal(signal.SIGINT)

    def stop(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """Stop the process and all that it started, with force where it does not stop by itself in time."""
        if self._stopped:
            return
        try:
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout_s)
        finally:
            self._signal(signal.SIGKILL)
            self.popen.wait()
            self._reader.join(timeout_s)
            self._stopped = True

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # everything in the group has ended
            os.killpg(self.pid, number)

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as output:
            for text in output:
                with self._changed:
                    self.lines.append(Line(time.monotonic(), text.rstrip()))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _tail(self) -> str:
        tail = [line.text for line in self.lines if line.text][-_TAIL_LINES:]
        return "".join(f"\n  {text}" for text in tail)


class LocalSwarm:
    """A bootstrap node and the servers started so far; leaving the context stops them all."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        """``variables`` are of all processes."""
        self._variables = dict(variables or {})
        self.processes: list[Process] = []
        self.address = ""
        """Where the bootstrap node listens."""
        self._folder = tempfile.TemporaryDirectory(prefix="petals-")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_bootstrap(self, timeout_s: float = 60.0, *, place: Place = LOOPBACK) -> str:
        """Start the node that others join through, and return its address."""
        arguments = ("bootstrap", "--host", place.host, "--port", "0")
        process = self.start("bootstrap", "petals-dht", *arguments, place=place)
        address = re.compile(rf"\b{re.escape(place.host)}:(\d+)\b")
        self.address = process.wait_for(address, timeout_s)[1][0]
        return self.address

    def start_server(
        self,
        model: Path | str,
        start: int,
        end: int,
        *options: str,
        variables: Mapping[str, str] | None = None,
        place: Place = LOOPBACK,
    ) -> Process:
        """Start a server of blocks ``start:end`` in float32; it loads while this returns."""
        span = f"{start}:{end}"
        arguments = ["serve", str(model), "--blocks", span, "--initial-peers", self.address, "--host", place.host]
        arguments += ["--port", "0", "--torch-dtype", "float32", *options]
        return self.start(f"server {span}", "petals-server", *arguments, variables=variables, place=place)

    def start_baseline(self, code: str, timeout_s: float = 60.0) -> Process:
        """Start a Python process that runs ``code`` (imports, say) and then waits, to compare memory with."""
        process = self._launch("baseline", [sys.executable, "-c", code + _THEN_WAIT])
        process.wait_for(_WAITS, timeout_s)
        return process

    def start(
        self,
        name: str,
        program: str,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
        place: Place = LOOPBACK,
    ) -> Process:
        """Start one of the project's commands."""
        command = [*place.prefix, str(Path(sys.executable).parent / program), *arguments]
        return self._launch(name, command, variables)

    def _launch(self, name: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> Process:
        own = {"PETALS_DATA_DIR": self._folder.name, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        process = Process(name, command, {**os.environ, **own, **self._variables, **(variables or {})})
        self.processes.append(process)
        return process

    def check(self) -> None:
        """See that every process still runs.

        Raises:
            ProcessError: one has ended.
        """
        for process in self.processes:
            process.check()

    def stop(self) -> None:
        """Stop everything, the bootstrap node last so that servers can still say that they leave."""
        for process in self.processes[1:]:
            process.interrupt()
        try:
            for process in reversed(self.processes):
                process.stop()
        finally:
            for process in self.processes:  # if stopping was itself interrupted
                process.stop(timeout_s=0)
            self._folder.cleanup()


def spans(num_blocks: int, num_servers: int) -> list[tuple[int, int]]:
    """Divide the blocks of a model among servers as evenly as possible."""
    return list(itertools.pairwise(num_blocks * number // num_servers for number in range(num_servers + 1)))


@contextlib.contextmanager
def stopping_in_order() -> Iterator[None]:
    """Turn a request to terminate into ``KeyboardInterrupt``, so that contexts are left and processes are stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
