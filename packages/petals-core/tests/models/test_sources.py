from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from petals_core.errors import CheckpointError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_core.testing.hub import COMMIT, NAME, FakeHub, serving, sha256


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


@pytest.fixture
def single_hub(single: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(single, monkeypatch) as hub:
        yield hub


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
