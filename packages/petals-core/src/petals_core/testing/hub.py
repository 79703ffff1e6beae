"""A hub on loopback, that can fail in the ways in which hubs and networks fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Protocol

COMMIT: Final = "c0ffee" + "0" * 34
NAME: Final = "somebody/tiny-llama"


def sha256(path: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """As much of the hub's HTTP interface as is used to read one repository, which is a folder's files."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status = 200
        self.error_code = ""
        self.cut_after: int | None = None
        """Bytes of a safetensors file after which each answer breaks off."""
        self.num_corrupted = 0
        """Answers with safetensors files, from now on, that have a wrong byte."""
        self.claimed_bytes: int | None = None
        """The size that safetensors files are said to have."""
        self.fetched: list[tuple[str, str | None]] = []
        """Path of each GET of a file, and the range that was asked for."""
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched_weights(self) -> list[tuple[str, str | None]]:
        """What of ``fetched`` are weights."""
        return [(file, wanted) for file, wanted in self.fetched if file.endswith(".safetensors")]


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
            self._send(200, self._describe(), {"Content-Type": "application/json"}, with_body=with_body)
            return
        match = re.fullmatch(rf"/{NAME}/resolve/(?:{COMMIT}|main)/([^/?]+)", self.path)
        path = hub.folder / match[1] if match else hub.folder / "none"
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body=with_body)
            return
        self._send_file(path, with_body=with_body)

    def _describe(self) -> bytes:
        files = []
        for path in sorted(self.server.folder.iterdir()):
            size = path.stat().st_size
            entry: dict[str, Any] = {"rfilename": path.name, "size": size, "blobId": "0" * 40}
            if path.suffix == ".safetensors":
                claimed = self.server.claimed_bytes
                size = size if claimed is None else claimed
                entry["lfs"] = {"sha256": sha256(path), "size": size, "pointerSize": 130}
            files.append(entry)
        return json.dumps({"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": files}).encode()

    def _send_file(self, path: Path, *, with_body: bool) -> None:
        hub = self.server
        content = path.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(path)}"', "Accept-Ranges": "bytes"}
        is_weights = path.suffix == ".safetensors"
        wanted = self.headers.get("Range")
        if with_body:
            hub.fetched.append((path.name, wanted))
            if is_weights and hub.num_corrupted:
                hub.num_corrupted -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
        status = 200
        if wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            size = len(content)
            stop = min(int(last), size - 1) if last else size - 1
            content = content[int(first) : stop + 1]
            headers["Content-Range"] = f"bytes {first}-{stop}/{size}"
            status = 206
        cut_after = hub.cut_after if is_weights else None
        self._send(status, content, headers, with_body=with_body, cut_after=cut_after)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool, cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[:cut_after])
            self.close_connection = True


class Patcher(Protocol):
    """``pytest.MonkeyPatch``."""

    def setattr(self, target: object, name: str, value: object) -> None: ...


@contextmanager
def serving(folder: Path, patcher: Patcher) -> Iterator[FakeHub]:
    """Serve a folder, and have ``huggingface_hub`` in this process ask nobody else."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

    hub = FakeHub(folder)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    # huggingface_hub reads HF_ENDPOINT when it is imported, which is over.
    patcher.setattr(constants, "ENDPOINT", hub.url)
    patcher.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patcher.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    disable_progress_bars()
    try:
        yield hub
    finally:
        enable_progress_bars()
        hub.shutdown()
        hub.server_close()
        thread.join()
