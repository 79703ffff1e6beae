from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from petals_core.errors import CheckpointError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.downloads import DownloadCache, RemoteFile
from petals_core.models.span import load_span
from petals_core.testing.hub import NAME, FakeHub, sha256


def block_file(hub: FakeHub, block: int) -> Path:
    """The one file with a certain tensor of a block."""
    index = json.loads((hub.folder / "model.safetensors.index.json").read_text())
    return hub.folder / str(index["weight_map"][f"model.layers.{block}.mlp.up_proj.weight"])


def fetch(cache: Path, block: int, **arguments: object) -> Checkpoint:
    """Download a block's file."""
    checkpoint = Checkpoint.open(NAME, cache_dir=cache, **arguments)  # type: ignore[arg-type]
    checkpoint.fetch([f"model.layers.{block}.mlp.up_proj.weight"])
    return checkpoint


def blobs(cache: Path, hub: FakeHub) -> set[str]:
    """Names of the safetensors files that are there, with ``.part`` where they are not complete."""
    names = {sha256(path): path.name for path in hub.folder.glob("*.safetensors")}
    found = (path.name for path in cache.glob("*/blobs/*"))
    return {names[name[:64]] + name[64:] for name in found if name[:64] in names}


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_download_that_is_cut_goes_on_where_it_was(hub: FakeHub, tmp_path: Path) -> None:
    file = block_file(hub, 1)
    size = file.stat().st_size
    hub.cut_after = size // 3
    told: list[tuple[str, int, int]] = []
    fetch(tmp_path, 1, progress=lambda *what: told.append(what))
    starts = [int(wanted[6:-1]) if wanted else 0 for _, wanted in hub.fetched_weights()]
    assert starts == list(range(0, size, size // 3))
    assert blobs(tmp_path, hub) == {file.name}
    downloads = [(done, num_bytes) for what, done, num_bytes in told if what == f"download {file.name}"]
    assert downloads[-1] == (size, size)
    assert downloads == sorted(downloads)


def test_the_next_start_goes_on_where_the_last_one_ended(hub: FakeHub, tmp_path: Path) -> None:
    file = block_file(hub, 1)
    checkpoint = Checkpoint.open(NAME, cache_dir=tmp_path)
    partial = DownloadCache(tmp_path, NAME).blob(RemoteFile(name="", sha256=sha256(file), num_bytes=1))
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.with_name(f"{partial.name}.part").write_bytes(file.read_bytes()[:1000])  # as a killed process leaves it
    checkpoint.fetch(["model.layers.1.mlp.up_proj.weight"])
    assert hub.fetched_weights() == [(file.name, "bytes=1000-")]
    assert blobs(tmp_path, hub) == {file.name}


def test_a_hub_that_goes_away_is_said_and_what_is_here_stays(hub: FakeHub, tmp_path: Path) -> None:
    file = block_file(hub, 1)
    remote = RemoteFile(name=file.name, sha256=sha256(file), num_bytes=file.stat().st_size)
    cache = DownloadCache(tmp_path, NAME, retry_s=0.0)
    cache.reserve([remote])
    hub.cut_after = 0
    url = f"{hub.url}/{NAME}/resolve/main/{file.name}"
    for status, message in ((200, "could not be reached for .* MiB are here"), (503, "could not be reached for .*503")):
        hub.status = status
        with pytest.raises(CheckpointError, match=message) as raised:
            cache.download(remote, url, {}, None)
        assert "the next start goes on from there" in str(raised.value)
        assert "\n" not in str(raised.value)
    hub.status = 403
    with pytest.raises(CheckpointError, match=r"does not give .* \(status 403\): check the token"):
        cache.download(remote, url, {}, None)
    hub.status, hub.cut_after = 200, None
    cache.download(remote, url, {}, None)
    assert blobs(tmp_path, hub) == {file.name}


def test_what_arrives_broken_is_not_kept(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.num_corrupted = 1
    fetch(tmp_path, 1)
    assert "is downloaded again" in caplog.text
    hub.num_corrupted = 2
    with pytest.raises(CheckpointError, match="arrives broken from the hub: try again later"):
        fetch(tmp_path, 4)
    assert blobs(tmp_path, hub) == {block_file(hub, 1).name}
    fetch(tmp_path, 4)


def test_a_file_that_was_cut_in_the_cache_is_downloaded_again(hub: FakeHub, tmp_path: Path) -> None:
    fetch(tmp_path, 1)
    (blob,) = [path for path in tmp_path.glob("*/blobs/*") if path.name == sha256(block_file(hub, 1))]
    blob.write_bytes(blob.read_bytes()[:-1])
    load_span(Checkpoint.open(NAME, cache_dir=tmp_path), 1, 2)
    assert blob.read_bytes() == block_file(hub, 1).read_bytes()


def test_two_who_want_the_same_file_download_it_once(hub: FakeHub, tmp_path: Path) -> None:
    checkpoints = [Checkpoint.open(NAME, cache_dir=tmp_path) for _ in range(2)]
    failures: list[BaseException] = []

    def run(checkpoint: Checkpoint) -> None:
        try:
            load_span(checkpoint, 1, 4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(checkpoint,)) for checkpoint in checkpoints]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    fetched = hub.fetched_weights()
    assert len(fetched) == len(set(fetched)) > 1


# --- room -------------------------------------------------------------------------------------------------------------


def test_what_was_not_used_for_longest_makes_room(hub: FakeHub, tmp_path: Path) -> None:
    files = [block_file(hub, block) for block in (0, 2, 4)]
    assert len(set(files)) == 3
    budget = sum(file.stat().st_size for file in files[:2]) + 100
    for block in (0, 2, 0):  # the last use of 0 is after that of 2
        fetch(tmp_path, block, max_disk_bytes=budget)
    fetch(tmp_path, 4, max_disk_bytes=budget)
    assert blobs(tmp_path, hub) == {files[0].name, files[2].name}
    assert {path.name for path in tmp_path.glob("*/snapshots/*/*.safetensors")} == {files[0].name, files[2].name}
    hub.fetched.clear()
    fetch(tmp_path, 2, max_disk_bytes=budget)
    assert hub.fetched_weights() == [(files[1].name, None)]


def test_what_somebody_uses_or_others_downloaded_stays(hub: FakeHub, tmp_path: Path) -> None:
    files = [block_file(hub, block) for block in (0, 2, 4)]
    budget = sum(file.stat().st_size for file in files[:2]) + 100
    user = fetch(tmp_path, 0, max_disk_bytes=budget)
    fetch(tmp_path, 2, max_disk_bytes=budget)
    fetch(tmp_path, 4, max_disk_bytes=budget)
    assert blobs(tmp_path, hub) == {files[0].name, files[2].name}
    other = fetch(tmp_path, 4, max_disk_bytes=budget)
    with pytest.raises(CheckpointError, match=r"more than --max-disk-space .* leaves: raise it, or serve fewer blocks"):
        fetch(tmp_path, 2, max_disk_bytes=budget)
    assert blobs(tmp_path, hub) == {files[0].name, files[2].name}
    del user, other
    for note in (tmp_path / ".petals" / "files").iterdir():
        note.unlink()  # as if other programs had downloaded them
    fetch(tmp_path, 2, max_disk_bytes=budget)
    assert blobs(tmp_path, hub) == {file.name for file in files}


def test_a_span_that_does_not_fit_is_refused_before_anything_is_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(NAME, cache_dir=tmp_path, max_disk_bytes=100_000)
    with pytest.raises(CheckpointError, match=r"to be downloaded, .* MiB more than --max-disk-space") as raised:
        load_span(checkpoint, 0, 6)
    assert "\n" not in str(raised.value)
    assert not hub.fetched_weights()
    assert not blobs(tmp_path, hub)


def test_a_disk_that_is_too_small_is_seen_before(hub: FakeHub, tmp_path: Path) -> None:
    hub.claimed_bytes = 10**17
    with pytest.raises(CheckpointError, match=r"the disk of .* has .* too little room: make room"):
        fetch(tmp_path, 0)
    assert not hub.fetched_weights()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here is always full")
def test_a_disk_that_fills_up_leaves_nothing_half_written(hub: FakeHub, tmp_path: Path) -> None:
    file = block_file(hub, 0)
    checkpoint = Checkpoint.open(NAME, cache_dir=tmp_path)
    partial = next(tmp_path.glob("models--*")) / "blobs" / f"{sha256(file)}.part"
    partial.symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(
        CheckpointError, match=r"can't be stored in .* \(No space left on device\): make room"
    ) as raised:
        checkpoint.fetch(["model.layers.0.mlp.up_proj.weight"])
    assert "\n" not in str(raised.value)
    assert not blobs(tmp_path, hub)
    fetch(tmp_path, 0)
    assert blobs(tmp_path, hub) == {file.name}


def test_a_folder_that_can_not_be_written_to(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't be stored") as raised:
        fetch(tmp_path / "file", 0)
    assert "\n" not in str(raised.value)


# --- several processes ------------------------------------------------------------------------------------------------

FETCH = """
import logging, sys
from petals_core.models.checkpoint import Checkpoint
logging.basicConfig(level=logging.INFO, format="%(message)s")
Checkpoint.open(sys.argv[1], cache_dir=sys.argv[2]).fetch(["model.layers.1.mlp.up_proj.weight"])
print("fetched", flush=True)
"""


def test_a_process_waits_for_what_another_one_downloads(hub: FakeHub, tmp_path: Path) -> None:
    file = block_file(hub, 1)
    cache = DownloadCache(tmp_path, NAME)
    blob = cache.blob(RemoteFile(name=file.name, sha256=sha256(file), num_bytes=file.stat().st_size))
    locks = tmp_path / ".locks" / blob.parent.parent.name
    locks.mkdir(parents=True)
    command = [sys.executable, "-c", FETCH, NAME, str(tmp_path)]
    with FileLock(locks / f"{blob.name}.lock"):  # as one has that is downloading
        child = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_ENDPOINT": hub.url},
        )
        assert child.stderr is not None
        waiting = f"waiting for {file.name}, which another process downloads\n"
        assert waiting in iter(child.stderr.readline, "")
        shutil.copyfile(file, blob)
    output, errors = child.communicate(timeout=60)
    assert (output, child.returncode) == ("fetched\n", 0), errors
    assert not hub.fetched_weights()
