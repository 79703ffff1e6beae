from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from petals_core.errors import CheckpointError
from petals_core.models.hashes import file_sha256


def settled(path: Path, content: bytes, *, mtime_ns: int = 1_700_000_000_000_000_000) -> str:
    """Write a file as if long ago, and return its hash."""
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "x"
    expected = settled(path, b"abc" * 10_000)
    reads: list[tuple[str, int, int]] = []
    for _ in range(2):
        assert file_sha256(path, lambda *progress: reads.append(progress)) == expected
    assert reads == [("hash x", 30_000, 30_000)]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x"
    settled(path, b"abc")
    file_sha256(path)
    assert file_sha256(path) != settled(path, b"abd", mtime_ns=1_700_000_000_000_000_001)
    assert file_sha256(path) == hashlib.sha256(b"abd").hexdigest()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, cache_folder: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    file_sha256(path)
    assert not list(cache_folder.rglob("*.json"))


def test_a_broken_note_is_worked_out_again(tmp_path: Path, cache_folder: Path) -> None:
    path = tmp_path / "x"
    expected = settled(path, b"abc")
    file_sha256(path)
    [note] = cache_folder.rglob("*.json")
    for content in (b"", b"{", b"[]", b'{"sha256": "short"}', b'{"sha256": 3}'):
        note.write_bytes(content)
        assert file_sha256(path) == expected


def test_without_a_writable_cache_the_hash_is_still_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("PETALS_CACHE_DIR", str(blocker / "below"))
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"").hexdigest()


def test_three_at_once_agree_and_read_the_file_once(tmp_path: Path) -> None:
    path = tmp_path / "x"
    expected = settled(path, os.urandom(1_000_000))
    start = threading.Barrier(3)
    results: list[str] = []
    reads: list[int] = []

    def ask() -> None:
        start.wait()
        results.append(file_sha256(path, lambda what, done, total: reads.append(done)))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 3
    assert reads.count(1_000_000) == 1


def test_three_processes_at_once_agree(tmp_path: Path) -> None:
    path = tmp_path / "x"
    expected = settled(path, os.urandom(1_000_000))
    code = "import sys; from petals_core.models.hashes import file_sha256, Path; print(file_sha256(Path(sys.argv[1])))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in processes] == [expected] * 3


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        file_sha256(tmp_path / "none")
