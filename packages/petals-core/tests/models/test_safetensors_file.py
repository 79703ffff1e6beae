from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from petals_core.errors import CheckpointError
from petals_core.models.safetensors_file import read_header, read_tensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path) -> None:
    tensors = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path, path.name)
    assert header.keys() == tensors.keys()
    for name, expected in tensors.items():
        tensor = read_tensor(path, header[name])
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_a_tensor_read_does_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    tensor = read_tensor(path, read_header(path, path.name)["a"])
    path.write_bytes(b"")
    assert tensor.sum() == 1000
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{ ", "broken header"),
        ([1], "broken header"),
        (b"[" * 50_000, "broken header"),
        ({"a": 3}, "can't be read"),
        ({"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, "can't be read"),
        ({"a": {"dtype": "F32", "shape": [1, True], "data_offsets": [0, 4]}}, "can't be read"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "can't be read"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "can't be read"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "can't be read"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "truncated"),
    ],
)
def test_broken_headers_are_one_clear_line(tmp_path: Path, header: object, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, b"\0\0\0")
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(path, path.name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"123", b"\xff" * 16, (10**6).to_bytes(8, "little") + b"{}"])
def test_cut_files_are_called_truncated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_header(path, path.name)


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path, path.name)


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    entry = read_header(path, path.name)["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends before"):
        read_tensor(path, entry)
    path.unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        read_tensor(path, entry)


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_garbage_raises_checkpoint_errors_only(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    for data in (content, len(content).to_bytes(8, "little") + content):
        path.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            read_header(path, path.name)
