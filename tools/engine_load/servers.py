"""The server under load, a process of its own started by its public command."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import local_swarm
import proportional_memory
from environment import ROOT

_READY_TIMEOUT_S = 180.0
_SERVING = re.compile(r"^serving .* --initial-peers (\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server."""

    address: str
    pid: int

    def pss_bytes(self) -> int:
        """Its memory, shared pages counted in proportion."""
        return proportional_memory.pss_bytes(self.pid)

    def num_sockets(self) -> int:
        """Its open sockets."""
        count = 0
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                count += os.readlink(entry).startswith("socket:")  # noqa: PTH115
        return count

    def num_threads(self) -> int:
        """Its threads."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))


@contextlib.contextmanager
def serving(folder: Path, num_blocks: int, *options: str, source: Path | None = None) -> Iterator[Server]:
    """A server of all blocks, in a swarm of its own; ``source``: of that checkout instead of this one."""
    variables = {"OMP_WAIT_POLICY": "PASSIVE"}
    if source is not None:
        members = ("core", "dht", "server", "client")
        variables["PYTHONPATH"] = os.pathsep.join(str(source / f"packages/petals-{name}/src") for name in members)
    with local_swarm.LocalSwarm() as swarm:
        swarm.start_bootstrap()
        process = swarm.start_server(folder, 0, num_blocks, *options, variables=variables)
        found = process.wait_for(_SERVING, _READY_TIMEOUT_S)[1]
        yield Server(address=found[1], pid=process.pid)


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The tree of a revision of this repository, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="petals-baseline-") as temporary:
        folder = Path(temporary) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), revision], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(folder)], check=True)
