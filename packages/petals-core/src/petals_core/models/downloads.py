"""Large files from the hub into its cache: once per machine, going on where they were cut, within a budget of disk.

The files end up where ``huggingface_hub`` keeps them (``blobs/<SHA-256>`` of a repository's folder), under the lock
that it takes itself, so that other programs find them. What is added is in ``.petals`` of the cache's folder:

- ``files/<SHA-256>.json`` for each file that was downloaded here: its size, its repository, when it was last used. Only
  these count towards the budget, and only these are ever deleted.
- ``users/<name>.json`` for each running process that uses some of them, valid as long as the process holds the lock
  beside it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from filelock import FileLock, Timeout

from petals_core.errors import CheckpointError, first_line
from petals_core.models.hashes import ProgressCallback, is_sha256, read_note, write_note

_log: Final = logging.getLogger(__name__)
_MAX_FAILURES: Final = 4
"""Attempts in a row that bring nothing."""
_READ_TIMEOUT_S: Final = 30.0
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a repository, by content."""

    name: str
    sha256: str
    num_bytes: int


class DownloadCache:
    """The cache's folder as one process uses it, for one repository.

    ``max_disk_bytes`` bounds what all files that were downloaded by this software take together; None: the disk.
    """

    def __init__(
        self, folder: Path, repository: str, *, max_disk_bytes: int | None = None, retry_s: float = 1.0
    ) -> None:
        from huggingface_hub.file_download import repo_folder_name

        self.folder = folder
        self._repository = repo_folder_name(repo_id=repository, repo_type="model")
        self._max_disk_bytes = max_disk_bytes
        self._retry_s = retry_s
        self._notes = folder / ".petals" / "files"
        self._users = folder / ".petals" / "users"
        self._used: set[str] = set()
        self._user: Path | None = None

    def blob(self, file: RemoteFile) -> Path:
        """Where a file's content lies once it is complete."""
        return self.folder / self._repository / "blobs" / file.sha256

    def is_complete(self, file: RemoteFile) -> bool:
        """Whether it is here and of the right size."""
        try:
            return self.blob(file).stat().st_size == file.num_bytes
        except OSError:
            return False

    # --- room ---------------------------------------------------------------------------------------------------------

    def reserve(self, files: Iterable[RemoteFile]) -> None:
        """Set disk space aside for files that are about to be used, and say that this process uses them.

        Where the budget or the disk has no room, files that nobody uses are deleted, the one that was not used for
        longest first.

        Raises:
            CheckpointError: there is no room, or the folder can't be written to.
        """
        wanted = {file.sha256: file for file in files}
        try:
            self._notes.mkdir(parents=True, exist_ok=True)
            self._users.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".petals" / "room.lock"):
                self._make_room(wanted)
                self._say_used(wanted)
        except OSError as error:
            fail_to_write(self.folder, error)

    def _make_room(self, wanted: dict[str, RemoteFile]) -> None:
        missing = [file for file in wanted.values() if not self.is_complete(file)]
        needed = sum(file.num_bytes for file in missing)
        on_disk = sum(_size(self._partial(file)) for file in missing)
        notes = {path.stem: read_note(path) for path in self._notes.glob("*.json")}
        counted = sum(int(note["num_bytes"]) for key, note in notes.items() if _is_note(note) and key not in wanted)
        counted += sum(file.num_bytes for key, file in wanted.items() if key in notes)
        added = sum(file.num_bytes for file in missing if file.sha256 not in notes)
        over = 0 if self._max_disk_bytes is None else counted + added - self._max_disk_bytes
        lacking = needed - on_disk - shutil.disk_usage(self.folder).free
        if over > 0 or lacking > 0:
            in_use = self._in_use() | set(wanted)
            evictable = sorted(
                (note["used_at_s"], key) for key, note in notes.items() if _is_note(note) and key not in in_use
            )
            for _, key in evictable:
                if over <= 0 and lacking <= 0:
                    break
                freed = self._delete(key, str(notes[key]["repository"]))
                over -= int(notes[key]["num_bytes"])
                lacking -= freed
        if over > 0 and missing:
            assert self._max_disk_bytes is not None
            raise CheckpointError(
                f"{_mib(needed)} are to be downloaded, {_mib(over)} more than --max-disk-space "
                f"{_mib(self._max_disk_bytes)} leaves: raise it, or serve fewer blocks"
            )
        if lacking > 0:
            raise CheckpointError(
                f"{_mib(needed)} are to be downloaded and the disk of {self.folder} has {_mib(lacking)} too little "
                "room: make room, choose another --cache-dir, or serve fewer blocks"
            )
        for file in missing:
            self._note(file)
        for key, file in wanted.items():
            if key in notes:
                self._note(file)

    def _note(self, file: RemoteFile) -> None:
        value = {"num_bytes": file.num_bytes, "repository": self._repository, "used_at_s": time.time()}
        write_note(self._notes / f"{file.sha256}.json", value)

    def _delete(self, key: str, repository: str) -> int:
        """Delete a file and the links to it; returns the bytes that it took."""
        folder = self.folder / repository
        blob = folder / "blobs" / key
        for link in folder.glob("snapshots/*/*"):
            if link.is_symlink() and link.readlink().name == key:
                link.unlink()
        freed = 0
        for path in (blob, blob.with_name(f"{key}.part")):
            freed += _size(path)
            path.unlink(missing_ok=True)
        (self._notes / f"{key}.json").unlink(missing_ok=True)
        _log.info("deleted %s of %s, which was not used for longest: %s", key[:12], repository, _mib(freed))
        return freed

    def _say_used(self, keys: Iterable[str]) -> None:
        self._used.update(keys)
        if self._user is None:
            self._user = self._users / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
            lock = FileLock(self._user.with_suffix(".lock"))
            lock.acquire()
            weakref.finalize(self, _end_use, lock, self._user)
        write_note(self._user, {"files": sorted(self._used)})

    def _in_use(self) -> set[str]:
        used: set[str] = set()
        for path in self._users.glob("*.json"):
            if path == self._user:
                continue
            lock = FileLock(path.with_suffix(".lock"), timeout=0)
            try:
                with lock:  # its process has ended
                    path.unlink(missing_ok=True)
            except Timeout:
                used.update(map(str, read_note(path).get("files", ())))
            else:
                path.with_suffix(".lock").unlink(missing_ok=True)
        return used

    # --- downloads ----------------------------------------------------------------------------------------------------

    def _partial(self, file: RemoteFile) -> Path:
        return self.blob(file).with_name(f"{file.sha256}.part")

    def download(self, file: RemoteFile, url: str, headers: dict[str, str], progress: ProgressCallback | None) -> None:
        """Make sure that a file is complete. Of several processes one downloads it and the others wait.

        Raises:
            CheckpointError: the hub can't be reached or sends something else, or the disk is full.
        """
        if self.is_complete(file):
            return
        locks = self.folder / ".locks" / self._repository
        try:
            locks.mkdir(parents=True, exist_ok=True)
            self.blob(file).parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(locks / f"{file.sha256}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _log.info("waiting for %s, which another process downloads", file.name)
                lock.acquire()
            try:
                if not self.is_complete(file):
                    self._fetch(file, url, headers, progress)
            finally:
                lock.release()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._partial(file).unlink(missing_ok=True)
            fail_to_write(self.folder, error)

    def _fetch(self, file: RemoteFile, url: str, headers: dict[str, str], progress: ProgressCallback | None) -> None:
        partial = self._partial(file)
        for attempt in (1, 2):
            self._receive(file, partial, url, headers, progress)
            if _sha256(partial) == file.sha256:
                os.replace(partial, self.blob(file))
                return
            partial.unlink()
            if attempt == 1:
                _log.warning("%s did not arrive as the hub says it is, and is downloaded again", file.name)
        raise CheckpointError(f"{file.name} arrives broken from the hub: try again later, or choose another revision")

    def _receive(
        self, file: RemoteFile, partial: Path, url: str, headers: dict[str, str], progress: ProgressCallback | None
    ) -> None:
        """Fill ``partial`` from where it ends."""
        num_failures = 0
        while (done := _size(partial)) < file.num_bytes:
            try:
                _append(file, partial, url, headers, progress)
            except (OSError, CheckpointError):
                raise
            except Exception as error:  # the many ways in which a connection ends
                reason = first_line(error)
            else:
                reason = "it sent too little"
            num_failures = num_failures + 1 if _size(partial) == done else 0
            if num_failures >= _MAX_FAILURES:
                raise CheckpointError(
                    f"the hub could not be reached for {file.name} ({reason}), of which {_mib(done)} of "
                    f"{_mib(file.num_bytes)} are here: check the network; the next start goes on from there"
                )
            if num_failures > 1:
                time.sleep(self._retry_s * 2 ** (num_failures - 2))
        if done > file.num_bytes:
            partial.unlink()
            self._receive(file, partial, url, headers, progress)


def _append(
    file: RemoteFile, partial: Path, url: str, headers: dict[str, str], progress: ProgressCallback | None
) -> None:
    from huggingface_hub import get_session

    done = _size(partial)
    headers = headers | {"Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=_READ_TIMEOUT_S) as response:
        if response.status_code in (401, 403, 404):
            raise CheckpointError(
                f"the hub does not give {file.name} (status {response.status_code}): check the token and the revision"
            )
        response.raise_for_status()
        if done and response.status_code != 206:
            done = 0  # the whole file comes anew
        with partial.open("r+b" if done else "wb", buffering=0) as stream:
            stream.seek(done)
            for chunk in response.iter_bytes():  # as they arrive: of larger ones the last would be lost in a cut
                view = memoryview(chunk)
                while view:
                    view = view[stream.write(view) :]
                done += len(chunk)
                if progress is not None:
                    progress(f"download {file.name}", done, file.num_bytes)


def fail_to_write(folder: Path, error: OSError) -> NoReturn:
    """Say in one line that nothing can be stored.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"downloads can't be stored in {folder} ({error.strerror or error}): make room, or choose another --cache-dir"
    ) from None


def _end_use(lock: Any, user: Path) -> None:
    user.unlink(missing_ok=True)
    lock.release()
    user.with_suffix(".lock").unlink(missing_ok=True)


def _is_note(note: dict[str, Any]) -> bool:
    values = note.get("num_bytes"), note.get("used_at_s"), note.get("repository")
    return isinstance(values[0], int) and isinstance(values[1], float) and isinstance(values[2], str)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    assert is_sha256(digest)
    return digest


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f} MiB"
