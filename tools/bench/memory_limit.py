"""A bound on the memory of processes, page cache included: a control group of Linux, old (v1) or new (v2)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """A control group."""

    folder: Path
    limit_file: str
    statistics_name: str

    def add(self, pid: int) -> None:
        """Put a process in; what it takes from now on counts."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def limit(self, num_bytes: int) -> None:
        """Bound what all its processes take."""
        (self.folder / self.limit_file).write_text(str(num_bytes))

    def own_bytes(self) -> int:
        """What its processes have taken for themselves, without the cache of files."""
        statistics = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(statistics[self.statistics_name])


@contextlib.contextmanager
def memory_limit() -> Iterator[MemoryLimit]:
    """Make a group, and remove it at the end, when its processes must have ended.

    Raises:
        OSError: the system or the user's rights don't allow it.
    """
    name = f"petals-bench-{os.urandom(6).hex()}"  # numbers of processes repeat in the lab
    if (_ROOT / "cgroup.controllers").exists():
        group = MemoryLimit(folder=_ROOT / name, limit_file="memory.max", statistics_name="anon")
    else:
        group = MemoryLimit(
            folder=_ROOT / "memory" / name, limit_file="memory.limit_in_bytes", statistics_name="total_rss"
        )
    group.folder.mkdir()
    try:
        if not (group.folder / group.limit_file).exists():
            raise OSError("the system's control groups don't count memory")
        yield group
    finally:
        with contextlib.suppress(OSError):  # a process that was killed a moment ago may still count
            group.folder.rmdir()
