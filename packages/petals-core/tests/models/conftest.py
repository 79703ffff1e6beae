from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from petals_core.testing.factories import make_checkpoint
from petals_core.testing.hub import FakeHub, serving


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PETALS_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 6 blocks in several files. Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("sharded") / "tiny-llama", max_shard_size=100_000)


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 2 blocks in one file. Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("single") / "tiny-llama", num_blocks=2)


@pytest.fixture
def hub(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on loopback that has the llama in several files."""
    with serving(sharded, monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="session")
def folders() -> dict[str, Path]:
    """Those that were made, by family."""
    return {}


@pytest.fixture
def folder(family: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the family, 6 blocks in several files. Not to be changed."""
    if family not in folders:
        path = tmp_path_factory.mktemp(family)
        folders[family] = make_checkpoint(path, family, num_blocks=6, max_shard_size=100_000)
    return folders[family]
