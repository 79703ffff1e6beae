"""SHA-256 of files, remembered from one start to the next."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from petals_core.errors import CheckpointError

ProgressCallback = Callable[[str, int, int], None]
"""Called with what is being done ("hash <file>", "load <tensor>"), the bytes done, and the bytes in all."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_HASH_CHUNK_BYTES: Final = 4 << 20
_SETTLED_NS: Final = 2_000_000_000
"""A file changed less than this ago may change again without a newer time stamp: its hash is not remembered."""


def is_sha256(text: str) -> bool:
    """Whether this is a SHA-256 as hex."""
    return _SHA256.fullmatch(text) is not None


def cache_folder() -> Path:
    """Where this software keeps what it can work out again: ``PETALS_CACHE_DIR``, or the user's cache directory."""
    override = os.environ.get("PETALS_CACHE_DIR")
    if override:
        return Path(override)
    import platformdirs

    return Path(platformdirs.user_cache_dir("petals"))


def file_sha256(path: Path, progress: ProgressCallback | None = None) -> str:
    """SHA-256 of a file's content as hex. Reads the file once and remembers the result until the file changes.

    Several processes that ask at the same time wait for the first one's answer.

    Raises:
        CheckpointError: the file can't be read.
    """
    real = path.resolve()
    try:
        before = real.stat()
        key = json.dumps([str(real), before.st_size, before.st_mtime_ns, before.st_ino])
        note = cache_folder() / "sha256" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        if (known := _noted_sha256(note)) is not None:
            return known
        with _lock(note):
            if (known := _noted_sha256(note)) is not None:
                return known
            digest = hashlib.sha256()
            with real.open("rb", buffering=0) as file:
                done = 0
                buffer = bytearray(_HASH_CHUNK_BYTES)
                view = memoryview(buffer)
                while count := file.readinto(buffer):
                    digest.update(view[:count])
                    done += count
                    if progress is not None:
                        progress(f"hash {path.name}", done, before.st_size)
            after = real.stat()
            is_settled = time.time_ns() - after.st_mtime_ns > _SETTLED_NS
            if is_settled and (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                write_note(note, {"sha256": digest.hexdigest()})
            return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from None


def _noted_sha256(note: Path) -> str | None:
    value = read_note(note).get("sha256")
    return value if isinstance(value, str) and is_sha256(value) else None


def read_note(path: Path) -> dict[str, Any]:
    """A remembered value, or nothing: notes can always be worked out again."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_note(path: Path, value: object) -> None:
    """Write a note so that readers see all of it or nothing. Where nothing can be written, nothing is remembered."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(value, file)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError:
        return


@contextmanager
def _lock(note: Path) -> Iterator[None]:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    lock = note.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError:
        yield  # a cache folder that can't be written to: each process works the value out for itself
        return
    with WeakFileLock(lock):
        yield
