from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from petals_core.errors import CheckpointError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.split import load_span

COMMIT = "c0ffee" + "0" * 34
NAME = "somebody/tiny-llama"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def hub_cache(sharded: Path, tmp_path: Path) -> Path:
    """The cache of huggingface_hub after a download of everything."""
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for path in sharded.iterdir():
        blob = repository / "blobs" / (sha256(path) if path.suffix == ".safetensors" else sha256(path)[:40])
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return tmp_path / "hub"


def offline(hub_cache: Path, name: str = NAME, **arguments: Any) -> Checkpoint:
    return Checkpoint.open(name, cache_dir=hub_cache, local_files_only=True, **arguments)


def test_what_was_downloaded_works_offline_and_is_the_same_model_as_the_folder(sharded: Path, hub_cache: Path) -> None:
    checkpoint = offline(hub_cache)
    assert (checkpoint.name, checkpoint.revision) == (NAME, COMMIT)
    assert checkpoint.fingerprint == Checkpoint.open(sharded).fingerprint
    assert load_span(checkpoint, 0, 2).num_blocks == 2
    assert offline(hub_cache, revision=COMMIT).fingerprint == checkpoint.fingerprint


def test_in_the_hubs_cache_nothing_is_hashed(hub_cache: Path, cache_folder: Path) -> None:
    reads: list[object] = []
    _ = offline(hub_cache, progress=lambda *what: reads.append(what)).fingerprint
    assert not reads


def test_offline_errors_are_clear_lines(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nor among the models downloaded before.*go online once"):
        offline(hub_cache, "somebody/else")
    with pytest.raises(CheckpointError, match="nor among the models downloaded before"):
        offline(hub_cache, revision="other")
    checkpoint = offline(hub_cache)
    for path in hub_cache.glob("*/snapshots/*/model-00002*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="was not downloaded yet and the hub was not asked: go online once"):
        load_span(checkpoint, 0, 6)
    with pytest.raises(CheckpointError, match="was not downloaded yet"):
        _ = checkpoint.fingerprint


# --- a hub on loopback ------------------------------------------------------------------------------------------------


class FakeHub(ThreadingHTTPServer):
    """As much of the hub's HTTP interface as huggingface_hub uses to read one repository."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status = 200
        self.error_code = ""
        self.fetched: list[tuple[str, str | None]] = []
        """Path of each GET of a file, and the range that was asked for."""
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub = self.server
        if hub.status != 200:
            self.send_response(hub.status)
            if hub.error_code:
                self.send_header("X-Error-Code", hub.error_code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path.startswith("/api/models/"):
            files = []
            for path in sorted(hub.folder.iterdir()):
                entry: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size, "blobId": "0" * 40}
                if path.suffix == ".safetensors":
                    size = path.stat().st_size
                    entry["lfs"] = {"sha256": sha256(path), "size": size, "pointerSize": 130}
                files.append(entry)
            body = json.dumps({"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": files}).encode()
            self._send(200, body, {"Content-Type": "application/json"}, with_body=with_body)
            return
        match = re.fullmatch(rf"/{NAME}/resolve/(?:{COMMIT}|main)/([^/?]+)", self.path)
        path = hub.folder / match[1] if match else hub.folder / "none"
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body=with_body)
            return
        content = path.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(path)}"', "Accept-Ranges": "bytes"}
        status = 200
        wanted = self.headers.get("Range")
        if with_body:
            hub.fetched.append((path.name, wanted))
        if wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            size = len(content)
            stop = min(int(last), size - 1) if last else size - 1
            content = content[int(first) : stop + 1]
            headers["Content-Range"] = f"bytes {first}-{stop}/{size}"
            status = 206
        self._send(status, content, headers, with_body=with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    # huggingface_hub reads HF_ENDPOINT when it is imported, which is over.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    huggingface_hub.utils.disable_progress_bars()
    yield hub
    huggingface_hub.utils.enable_progress_bars()
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture
def hub(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    yield from serve(sharded, monkeypatch)


@pytest.fixture
def single_hub(single: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    yield from serve(single, monkeypatch)


def test_only_the_spans_files_are_downloaded_and_the_fingerprint_needs_none(
    hub: FakeHub, sharded: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(NAME, cache_dir=tmp_path)
    assert checkpoint.revision == COMMIT
    assert checkpoint.fingerprint == Checkpoint.open(sharded).fingerprint
    assert not [file for file, _ in hub.fetched if file.endswith(".safetensors")]
    load_span(checkpoint, 3, 4)
    own = checkpoint.tensor_files(name for name in checkpoint.tensor_names if ".layers.3." in name)
    assert {file for file, _ in hub.fetched if file.endswith(".safetensors")} == set(own)
    assert len(own) < len(checkpoint.files)

    hub.fetched.clear()
    hub.status = 503  # the hub goes away: everything is known already, hashes of files that are not here as well
    later = Checkpoint.open(NAME, cache_dir=tmp_path, local_files_only=True)
    assert later.fingerprint == checkpoint.fingerprint
    assert load_span(later, 3, 4).num_blocks == 1
    assert not hub.fetched


def test_of_a_single_file_only_the_header_is_read_before_it_is_needed(single_hub: FakeHub, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(NAME, cache_dir=tmp_path)
    assert "model.layers.1.mlp.up_proj.weight" in checkpoint.tensor_names
    assert all(wanted is not None for file, wanted in single_hub.fetched if file == "model.safetensors")
    assert load_span(checkpoint, 0, 2).num_blocks == 2


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no model somebody/tiny-llama on the hub .nor a folder of that name"),
        (404, "RevisionNotFound", "has no revision gone"),
        (403, "GatedRepo", "accept its terms"),
        (500, "", "the hub could not be reached"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(
    hub: FakeHub, tmp_path: Path, status: int, code: str, message: str
) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint.open(NAME, cache_dir=tmp_path, revision="gone")
    assert "\n" not in str(raised.value)


def test_no_hub_at_all(hub: FakeHub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"the hub could not be reached .*check the network") as raised:
        Checkpoint.open(NAME, cache_dir=tmp_path / "empty")
    assert "\n" not in str(raised.value)
    assert load_span(Checkpoint.open(NAME, cache_dir=hub_cache), 0, 1).num_blocks == 1
