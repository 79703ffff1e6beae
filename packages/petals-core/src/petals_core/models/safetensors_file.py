"""The safetensors format: a file's table of contents, and one tensor read into memory of its own.

Source: https://github.com/huggingface/safetensors#format. The format is read here rather than through its package
because that maps the file or copies from a mapping, and holds either until the last tensor is gone.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeGuard

import torch

from petals_core.errors import CheckpointError, NotEnoughMemoryError

COPY_AGAIN: Final = "copy or download the checkpoint again"

_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own bound

_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies: its file, and the bytes from ``start`` up to ``end`` of that file."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def dtype_name(dtype: torch.dtype) -> str:
    """The format's word for a dtype."""
    return next(name for name, known in _DTYPES.items() if known == dtype)


def read_header(path: Path, file: str) -> dict[str, TensorEntry]:
    """The table of contents of a safetensors file, checked against the file's size.

    Source: the format's description at https://github.com/huggingface/safetensors#format
    """
    try:
        with path.open("rb") as stream:
            return _parse_header(stream, path, file)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {COPY_AGAIN}") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from None


def _parse_header(stream: BinaryIO, path: Path, file: str) -> dict[str, TensorEntry]:
    size = os.fstat(stream.fileno()).st_size
    header_bytes = int.from_bytes(stream.read(8), "little")
    if size < 8 or not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
        if stream.seek(0) == 0 and stream.read(7) == b"version":
            raise CheckpointError(
                f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"
            )
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {COPY_AGAIN}")
    try:
        raw = json.loads(stream.read(header_bytes))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} has a broken header: {COPY_AGAIN}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} has a broken header: {COPY_AGAIN}")
    offset = 8 + header_bytes
    entries: dict[str, TensorEntry] = {}
    for name, value in raw.items():
        if name == "__metadata__":
            continue
        entry = _parse_entry(name, value, file, offset)
        if entry is None:
            raise CheckpointError(f"{path} describes its tensor {name} in a way that can't be read: {COPY_AGAIN}")
        if entry.end > size:
            raise CheckpointError(f"{path} is truncated ({size:,} bytes, {entry.end:,} expected): {COPY_AGAIN}")
        entries[name] = entry
    return entries


def _parse_entry(name: str, value: object, file: str, offset: int) -> TensorEntry | None:
    if not isinstance(value, dict):
        return None
    dtype_name, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        return None
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        return None
    return TensorEntry(name=name, file=file, dtype=dtype, shape=tuple(shape), start=offset + start, end=offset + end)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def read_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """Read one tensor into memory of its own: the file's bytes go straight there.

    Raises:
        CheckpointError: the file is missing, truncated or unreadable.
        NotEnoughMemoryError: there is no memory for it.
    """
    try:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
    except RuntimeError:
        raise NotEnoughMemoryError(
            f"no memory for the {entry.num_bytes / 2**20:,.0f} MiB of {entry.name}: serve fewer blocks"
        ) from None
    read_into(path, entry, tensor)
    return tensor


def read_into(path: Path, entry: TensorEntry, tensor: torch.Tensor) -> None:
    """Read one tensor into a contiguous CPU tensor of its dtype and shape. Errors as in :func:`read_tensor`."""
    assert tensor.is_contiguous()
    assert (tensor.dtype, tensor.nbytes) == (entry.dtype, entry.num_bytes)
    if entry.num_bytes == 0:
        return
    view = tensor.view(-1).view(torch.uint8).numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            while view.nbytes:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{path} ends before its tensor {entry.name} does: {COPY_AGAIN}")
                view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}): {COPY_AGAIN}") from None
