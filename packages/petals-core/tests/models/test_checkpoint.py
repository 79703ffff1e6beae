from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from petals_core.errors import CheckpointError
from petals_core.models.checkpoint import Checkpoint, resolve_dtype
from petals_core.testing.factories import edit_config, make_checkpoint


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    """A sharded checkpoint to be changed."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def flip_a_byte(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_all_tensors_of_all_files_are_there(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    expected = {name: value for path in sharded.glob("*.safetensors") for name, value in load_file(path).items()}
    assert len(checkpoint.files) > 3
    assert set(checkpoint.tensor_names) == set(expected)
    for name in checkpoint.tensor_names:
        tensor = checkpoint.read(name)
        assert torch.equal(tensor, expected[name])


def test_what_it_says_of_itself(sharded: Path) -> None:
    checkpoint = Checkpoint.open(str(sharded))
    assert checkpoint.name == "tiny-llama"
    assert checkpoint.revision is None
    assert checkpoint.config.num_hidden_layers == 6
    assert checkpoint.generation_config is not None
    assert checkpoint.dtype == torch.float32


def test_only_the_files_of_the_tensors_asked_for_are_opened(copied: Path) -> None:
    checkpoint = Checkpoint.open(copied)
    name = "model.layers.2.mlp.up_proj.weight"
    [file] = checkpoint.tensor_files([name])
    for path in copied.glob("*.safetensors"):
        if path.name != file:
            path.unlink()
    assert checkpoint.read(name).shape == (128, 64)
    with pytest.raises(CheckpointError, match="is missing although the checkpoint's index names it: copy or download"):
        checkpoint.read("model.layers.5.mlp.up_proj.weight")


def test_is_same_compares_content(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    key, value = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv")
    assert checkpoint.is_same(key, key)
    assert not checkpoint.is_same(key, value)
    assert not checkpoint.is_same(key, "model.norm.weight")


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(sharded: Path, copied: Path) -> None:
    fingerprint = Checkpoint.open(sharded).fingerprint
    assert len(bytes.fromhex(fingerprint)) == 32
    assert Checkpoint.open(copied).fingerprint == fingerprint
    edit_config(copied, transformers_version="9.9", _name_or_path="elsewhere", dtype="bfloat16")
    (copied / "README.md").write_text("other")
    assert Checkpoint.open(copied).fingerprint == fingerprint


def test_a_single_byte_of_the_weights_makes_another_fingerprint(sharded: Path, copied: Path) -> None:
    for path in sorted(copied.glob("*.safetensors"))[:2]:
        flip_a_byte(path)
        assert Checkpoint.open(copied).fingerprint != Checkpoint.open(sharded).fingerprint
        flip_a_byte(path)
    assert Checkpoint.open(copied).fingerprint == Checkpoint.open(sharded).fingerprint


def test_another_config_or_another_seed_makes_another_fingerprint(sharded: Path, copied: Path, tmp_path: Path) -> None:
    fingerprint = Checkpoint.open(sharded).fingerprint
    edit_config(copied, rms_norm_eps=1e-3)
    other = make_checkpoint(tmp_path / "other", max_shard_size=100_000, seed=1)
    again = make_checkpoint(tmp_path / "again", max_shard_size=100_000)
    assert Checkpoint.open(copied).fingerprint != fingerprint
    assert Checkpoint.open(other).fingerprint != fingerprint
    assert Checkpoint.open(again).fingerprint == fingerprint


def test_of_a_file_that_was_removed_the_note_of_its_download_is_taken(sharded: Path, copied: Path) -> None:
    fingerprint = Checkpoint.open(sharded).fingerprint
    path = sorted(copied.glob("*.safetensors"))[0]
    import hashlib

    notes = copied / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    note = notes / f"{path.name}.metadata"
    note.write_text(f"{'a' * 40}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n1700000000.0\n")
    path.unlink()
    assert Checkpoint.open(copied).fingerprint == fingerprint
    note.write_text(f"{'a' * 40}\n{'b' * 40}\n1700000000.0\n")  # a git hash, not of the content alone
    with pytest.raises(CheckpointError, match="is missing"):
        _ = Checkpoint.open(copied).fingerprint


# --- errors -----------------------------------------------------------------------------------------------------------


def fails(folder: str | Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint.open(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a/b/c", "../model", "sp ace", ""])
def test_no_such_folder(name: str) -> None:
    fails(name if name else "./", "there is no folder|has no config.json")


def test_no_config(tmp_path: Path) -> None:
    fails(tmp_path, "has no config.json: it is not a Transformers checkpoint")


def test_a_folder_has_no_revision(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="no revisions"):
        Checkpoint.open(sharded, revision="main")


def test_pickled_weights_are_refused(copied: Path) -> None:
    for path in copied.glob("*.safetensors*"):
        path.unlink()
    fails(copied, "only safetensors")
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    fails(copied, "pickled, which is not safe to load: use a safetensors version")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "has no weight_map"),
        (json.dumps({"weight_map": {"a": "../x.safetensors"}}), "no safetensors file"),
        (json.dumps({"weight_map": {"a": "x.bin"}}), "no safetensors file"),
        (json.dumps({"weight_map": {"a": 3}}), "no safetensors file"),
    ],
)
def test_a_broken_index(copied: Path, index: str, message: str) -> None:
    (copied / "model.safetensors.index.json").write_text(index)
    fails(copied, message)


def test_a_truncated_file(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "model"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    fails(folder, "truncated")


def test_an_index_that_promises_too_much(copied: Path) -> None:
    index = copied / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.none"] = "model-00001-of-00009.safetensors"
    content["weight_map"]["more"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    checkpoint = Checkpoint.open(copied)
    with pytest.raises(CheckpointError, match="lacks the tensor more that its index promises"):
        checkpoint.read("more")
    with pytest.raises(CheckpointError, match="has no tensor nonesuch"):
        checkpoint.tensor_files(["nonesuch"])


def test_dtypes_by_name(single: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single)
    assert resolve_dtype("auto", checkpoint) == torch.float32
    assert resolve_dtype("bfloat16", checkpoint) == torch.bfloat16
    assert resolve_dtype(torch.float16, checkpoint) == torch.float16
    for name in ("int8", "nonesuch", "Tensor"):
        with pytest.raises(CheckpointError, match="use auto, float32"):
            resolve_dtype(name, checkpoint)
    assert Checkpoint.open(make_checkpoint(tmp_path, num_blocks=1, dtype=torch.bfloat16)).dtype == torch.bfloat16
