from __future__ import annotations

import os
from pathlib import Path

import pytest

from petals_core.testing.factories import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama."""
    return make_checkpoint(tmp_path_factory.mktemp("llama"), num_blocks=4)


@pytest.fixture(scope="session")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bloom, whose attention needs a mask even without pads."""
    return make_checkpoint(tmp_path_factory.mktemp("bloom"), "bloom", num_blocks=4)


@pytest.fixture(scope="session")
def bamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bamba: three blocks with a recurrent state and one with attention."""
    return make_checkpoint(tmp_path_factory.mktemp("bamba"), "bamba", num_blocks=4, attn_layer_indices=[1])


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and remembered hashes of tests do not mix with the user's."""
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setitem(os.environ, "PETALS_DATA_DIR", str(folder / "data"))
    monkeypatch.setitem(os.environ, "PETALS_CACHE_DIR", str(folder / "cache"))
