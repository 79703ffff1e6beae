"""Server processes that start at once, because everything that takes long to import is there already.

A nursery is a process that imports torch, Transformers and the server, loads a span once and forgets it, and then forks
a child for each server that it is asked for. The children are servers as ``petals-server serve`` runs them, through the
public class, each a process of its own with its own key, port, event loop and threads; what they save is 2 to 4 s of
importing on every start. POSIX only.

    nursery = Nursery(folder)
    pid = nursery.start(Birth(...))
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

START_TIMEOUT_S: Final = 120.0
_COUNT_TIMEOUT_S: Final = 10.0
_TAIL_LINES: Final = 12
_IMPORTED: Final = "imported"
_BORN: Final = "born"
_READY: Final = "ready"
_HOLDS: Final = "holds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """A server to start."""

    number: int
    """By which its owner knows it; one of a number lives at a time."""
    model: str
    start: int
    end: int
    port: int
    initial_peers: Sequence[str]
    torch_dtype: str = "float32"
    cache_tokens: int = 16_384
    announced_port: int | None = None
    """Where others connect to, if something stands between; None: ``port``."""
    lifetime_s: float = 120.0
    """Of its announcements, which it renews three times meanwhile."""
    measures_neighbours: bool = True
    """Whether it connects to other servers now and then to see how far they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What a process has open."""

    num_tasks: int
    """Of its event loop, without those of the directory, which searches now and then."""
    num_streams: int
    """On all of its connections to peers."""
    num_sockets: int


class NurseryError(Exception):
    """The nursery ended, or a server did not start; the text says where to look."""


class Nursery:
    """Starts servers and knows which of them are ready. Leaving the context kills all of them."""

    def __init__(self, folder: Path) -> None:
        """``folder`` takes the servers' keys, and what they print."""
        self._folder = folder
        self._changed = threading.Condition()
        self._pids: dict[int, int] = {}
        """By numbers, the last process of each."""
        self._ready: set[int] = set()
        """Process ids."""
        self._holdings: dict[int, Holdings] = {}
        """By process ids, what servers have answered."""
        self._is_over = False
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._is_imported = False
        self._reader = threading.Thread(target=self._read, name="nursery", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_until_imported(self) -> None:
        """Wait until servers start at once."""
        self._wait(lambda: self._is_imported, "the nursery did not import in time")

    def start(self, birth: Birth) -> int:
        """Fork a server and return its process id; it loads while this returns."""
        self.wait_until_imported()
        with self._changed:
            self._pids.pop(birth.number, None)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(birth)) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise NurseryError("the nursery has ended") from None
        self._wait(lambda: birth.number in self._pids, f"server {birth.number} was not forked")
        return self._pids[birth.number]

    def is_ready(self, pid: int) -> bool:
        """Whether the server of that process has announced itself."""
        with self._changed:
            return pid in self._ready

    def wait_until_ready(self, pid: int) -> None:
        """Wait for that."""
        try:
            self._wait(lambda: pid in self._ready, f"the server of process {pid} was not ready in time")
        except NurseryError as error:
            raise NurseryError(f"{error}{self._tail(pid)}") from None

    def count(self, pid: int) -> Holdings:
        """Ask a server what it has open; it has to be ready and not stopped."""
        with self._changed:
            self._holdings.pop(pid, None)
        os.kill(pid, signal.SIGUSR1)
        with self._changed:
            if not self._changed.wait_for(lambda: pid in self._holdings, _COUNT_TIMEOUT_S):
                raise NurseryError(f"the server of process {pid} does not say what it has open")
            return self._holdings[pid]

    def close(self) -> None:
        """Kill all servers and the nursery."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _tail(self, pid: int) -> str:
        """What the server of that process, or one of its number before it, printed last."""
        number = next((number for number, other in self._pids.items() if other == pid), None)
        log = self._folder / f"server-{number}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "".join(f"\n  {line}" for line in lines[-_TAIL_LINES:])

    def _wait(self, is_so: Callable[[], bool], complaint: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: is_so() or self._is_over, START_TIMEOUT_S) or not is_so():
                raise NurseryError(complaint)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                word, *numbers = line.split()
                with self._changed:
                    match word, numbers:
                        case "imported", []:
                            self._is_imported = True
                        case "born", [number, pid]:
                            self._pids[int(number)] = int(pid)
                        case "ready", [pid]:
                            self._ready.add(int(pid))
                        case "holds", [pid, *counts]:
                            tasks, streams, sockets = map(int, counts)
                            self._holdings[int(pid)] = Holdings(
                                num_tasks=tasks, num_streams=streams, num_sockets=sockets
                            )
                        case _:
                            pass
                    self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


def name_tasks() -> Counter[str]:
    """What this event loop's tasks run, but for the directory's, and how many do."""
    codes = (getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks())
    return Counter(
        "another" if code is None else code.co_qualname
        for code in codes
        if code is None or "petals_dht" not in Path(code.co_filename).parts
    )


def open_sockets() -> list[int]:
    """The descriptors of this process's sockets, where the system tells (Linux)."""
    folder = Path("/proc/self/fd")
    found = []
    for entry in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(OSError):  # the descriptor that listed the folder
            if str(entry.readlink()).startswith("socket:"):
                found.append(int(entry.name))
    return found


# --- the nursery's own process ----------------------------------------------------------------------------------------


def _tell(*words: object) -> None:
    """One write, so that lines of several processes do not mix."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def _raise_servers(folder: Path) -> None:
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import petals_server.handlers
    import petals_server.loading
    import petals_server.server  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a server ended
    _tell(_IMPORTED)
    is_warm = False
    for line in sys.stdin:
        birth = Birth(**json.loads(line))
        if not is_warm:
            _load_once(birth)
            is_warm = True
        pid = os.fork()
        if pid == 0:
            _live(birth, folder)
        _tell(_BORN, birth.number, pid)
    os.killpg(os.getpid(), signal.SIGKILL)  # whoever asked is gone, so all go


def _load_once(birth: Birth) -> None:
    """Load a span and forget it, for what is imported only then. One thread computes, so a fork does no harm."""
    import torch

    from petals_server.config import ServerConfig
    from petals_server.loading import load_model, open_model

    torch.set_num_threads(1)
    config = ServerConfig(model=birth.model, torch_dtype=birth.torch_dtype, num_threads=1, cache_tokens=16)
    load_model(open_model(config, None), birth.start, birth.end, config)


def _live(birth: Birth, folder: Path) -> None:
    """Be a server until the process is killed."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(folder / f"server-{birth.number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        from petals_core.net.loop import new_event_loop

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(birth, folder))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


async def _serve(birth: Birth, folder: Path) -> None:
    from petals_core.addresses import Address
    from petals_core.identity import Identity
    from petals_server.config import ServerConfig
    from petals_server.server import Server

    class Behind(Server):
        """A server that others reach through something else."""

        async def _join(self, host: str | None) -> None:
            await super()._join(host)
            if birth.announced_port is not None:
                self.address = Address("127.0.0.1", birth.announced_port)

        def _measure_neighbours(self) -> None:
            if birth.measures_neighbours:
                super()._measure_neighbours()

    config = ServerConfig(
        model=birth.model,
        blocks=(birth.start, birth.end),
        host="127.0.0.1",
        port=birth.port,
        identity=Identity.load(folder / f"server-{birth.number}.key"),
        initial_peers=tuple(map(Address.parse, birth.initial_peers)),
        torch_dtype=birth.torch_dtype,
        num_threads=1,
        cache_tokens=birth.cache_tokens,
        announce_interval_s=birth.lifetime_s / 3,
        announce_lifetime_s=birth.lifetime_s,
    )
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    server = await Behind.start(config)

    def count() -> None:
        connections = (*server._listener._connections, *server.holding._dialer._connections.values())
        streams = sum(connection.num_streams for connection in connections)
        _tell(_HOLDS, os.getpid(), name_tasks().total(), streams, len(open_sockets()))

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, count)
    try:
        _tell(_READY, os.getpid())
        await stopping.wait()
    finally:
        await server.stop()


if __name__ == "__main__":
    _raise_servers(Path(sys.argv[1]))
