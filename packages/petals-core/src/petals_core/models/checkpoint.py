"""A checkpoint on disk or on the hub: its config, the names of its tensors, and each tensor when it is asked for.

Weights are read, not memory-mapped. A mapping is cheap to make, but its file can shrink under a running server (SIGBUS
kills the process, no handler can help), a flaky disk shows up in the middle of somebody's step instead of at start, and
the first steps pay for the disk. So a tensor's memory is allocated and the file's bytes are read straight into it, one
tensor at a time: nothing is held twice, and once the loading is done no file is open or mapped.

Only safetensors are read. Pickled weights (``pytorch_model.bin``) can run code and are refused.

Of the hub nothing is downloaded but the small JSON files and the safetensors files with tensors that are asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn, Protocol, TypeGuard

import torch

from petals_core.errors import CheckpointError, NotEnoughMemoryError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

ProgressCallback = Callable[[str, int, int], None]
"""Called with what is being done ("hash <file>", "load <tensor>"), the bytes done, and the bytes in all."""

_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PICKLED: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.bin")
_MAX_HEADER_BYTES: Final = 100_000_000  # the safetensors format's own bound
_MAX_JSON_BYTES: Final = 100_000_000
_HASH_CHUNK_BYTES: Final = 4 << 20
_VOLATILE_KEYS: Final = frozenset({"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"})
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_FILE_NAME: Final = re.compile(r"[\w.+=@-]+\.safetensors")
_SETTLED_NS: Final = 2_000_000_000
"""A file changed less than this ago may change again without a newer time stamp: its hash is not remembered."""

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


def cache_folder() -> Path:
    """Where this software keeps what it can work out again: ``PETALS_CACHE_DIR``, or the user's cache directory."""
    override = os.environ.get("PETALS_CACHE_DIR")
    if override:
        return Path(override)
    import platformdirs

    return Path(platformdirs.user_cache_dir("petals"))


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


class LazyTensor:
    """A tensor that is read from its file when it is indexed with ``[...]``, each time anew.

    The shape of what Transformers takes in a ``state_dict`` instead of tensors (a slice of the safetensors package has
    the same methods), so that loading holds one tensor at a time.
    """

    __slots__ = ("_checkpoint", "_on_read", "name")

    def __init__(self, checkpoint: Checkpoint, name: str, on_read: Callable[[TensorEntry], None] | None = None) -> None:
        self._checkpoint = checkpoint
        self._on_read = on_read
        self.name = name

    def __getitem__(self, key: object) -> torch.Tensor:
        tensor = self._checkpoint.read(self.name)
        if self._on_read is not None:
            self._on_read(self._checkpoint.entry(self.name))
        return tensor if key is Ellipsis else tensor[key]  # type: ignore[index]

    def get_shape(self) -> list[int]:
        return list(self._checkpoint.entry(self.name).shape)

    def get_dtype(self) -> str:
        dtype = self._checkpoint.entry(self.name).dtype
        return next(name for name, known in _DTYPES.items() if known == dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._checkpoint.entry(self.name).shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._checkpoint.entry(self.name).dtype


class Checkpoint:
    """A model's config and tensors, read as they are asked for. Make one with :meth:`open`."""

    def __init__(
        self,
        *,
        source: _Source,
        config: PreTrainedConfig,
        raw_config: dict[str, Any],
        generation_config: GenerationConfig | None,
        weight_files: dict[str, str],
        files: tuple[str, ...],
        progress: ProgressCallback | None,
    ) -> None:
        self._source = source
        self._raw_config = raw_config
        self._file_of = weight_files
        self._files = files
        self._progress = progress
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self.name: str = source.name
        """The hub's ``owner/name``, or the name of the folder."""
        self.revision: str | None = source.revision
        """The commit on the hub; None for a folder."""
        self.config = config
        self.generation_config = generation_config

    @classmethod
    def open(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Checkpoint:
        """Read the config and the index of a folder or of a repository on the hub; no weights yet.

        A path to an existing folder wins over a repository of the same name. Custom code is never run.

        Raises:
            CheckpointError: there is no such model, it can't be reached, or its files are broken or not safetensors.
            UnsupportedModelError: this version of Transformers does not know the architecture.
        """
        folder = Path(name_or_path)
        source: _Source
        if folder.is_dir():
            if revision is not None:
                raise CheckpointError(f"{folder} is a folder and has no revisions: leave the revision out")
            source = _Folder(folder)
        else:
            text = str(name_or_path)
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
                raise CheckpointError(f"there is no folder {text}: check the path, or give a hub name like owner/model")
            source = _Hub(
                text,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else str(cache_dir),
                local_files_only=local_files_only,
            )
        config_path = source.find("config.json")
        if config_path is None:
            raise CheckpointError(f"{source} has no config.json: it is not a Transformers checkpoint")
        raw_config = _read_json(config_path)
        config = _parse_config(config_path, source)
        generation_config = _parse_generation_config(source)
        weight_files, files = _find_weights(source)
        checkpoint = cls(
            source=source,
            config=config,
            raw_config=raw_config,
            generation_config=generation_config,
            weight_files=weight_files,
            files=files,
            progress=progress,
        )
        config.name_or_path = source.name
        return checkpoint

    def __repr__(self) -> str:
        return f"Checkpoint({str(self._source)!r})"

    # --- names -------------------------------------------------------------------------------------------------------

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._file_of)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all safetensors files, whether they are on this machine or not."""
        return self._files

    def tensor_files(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names of the files that hold these tensors, each once.

        Raises:
            CheckpointError: the checkpoint has no tensor of such a name.
        """
        return tuple(dict.fromkeys(self._file(name) for name in names))

    def _file(self, name: str) -> str:
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(
                f"{self._source} has no tensor {name}: its config and its weights do not fit together"
            )
        return file

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor. Opens (on the hub: downloads) its file if that did not happen yet."""
        file = self._file(name)
        header = self._headers.get(file)
        if header is None:
            header = self._headers[file] = _read_header(self._source.path(file), file)
        entry = header.get(name)
        if entry is None:
            raise CheckpointError(f"{file} of {self._source} lacks the tensor {name} that its index promises: {_AGAIN}")
        return entry

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the checkpoint is meant to be run in: what its config says, else that of its first weight."""
        for config in (self.config, self.config.get_text_config(decoder=True)):
            dtype = getattr(config, "dtype", None)
            if isinstance(dtype, torch.dtype):
                return dtype
        for name in self._file_of:
            if (dtype := self.entry(name).dtype).is_floating_point:
                return dtype
        return torch.float32

    # --- tensors -----------------------------------------------------------------------------------------------------

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own.

        Raises:
            CheckpointError: no such tensor, or its file is missing, truncated or unreadable.
            NotEnoughMemoryError: there is no memory for it.
        """
        entry = self.entry(name)
        path = self._source.path(entry.file)
        try:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
        except RuntimeError:
            raise NotEnoughMemoryError(
                f"no memory for the {entry.num_bytes / 2**20:,.0f} MiB of {name}: serve fewer blocks"
            ) from None
        if entry.num_bytes == 0:
            return tensor
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                while view.nbytes:
                    count = file.readinto(view)
                    if not count:
                        raise CheckpointError(f"{path} ends before its tensor {name} does: {_AGAIN}")
                    view = view[count:]
        except OSError as error:
            raise CheckpointError(f"{path} can't be read ({error.strerror}): {_AGAIN}") from None
        return tensor

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors, each into memory of its own. Errors as in :meth:`read`."""
        return {name: self.read(name) for name in names}

    def fetch(self, names: Iterable[str]) -> int:
        """Make sure that the files of these tensors are here (on the hub: download them) and whole.

        Returns:
            The size of the tensors in bytes, as stored.

        Raises:
            CheckpointError: a file is missing, broken, or can't be downloaded.
        """
        return sum(self.entry(name).num_bytes for name in names)

    def lazy(self, names: Mapping[str, str], *, num_bytes: int | None = None) -> dict[str, LazyTensor]:
        """Tensors by new name (the mapping's key) that are read from their files when they are indexed with ``[...]``.

        ``num_bytes`` is told to ``progress`` as the size of all that will be read.
        """
        progress = self._progress
        done = 0

        def report(entry: TensorEntry) -> None:
            nonlocal done
            done += entry.num_bytes
            if progress is not None:
                progress(f"load {entry.name}", done, num_bytes or done)

        return {new: LazyTensor(self, name, report) for new, name in names.items()}

    def is_same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal to the last bit, found out without holding either."""
        a, b = self.entry(first), self.entry(second)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with self._source.path(a.file).open("rb") as file_a, self._source.path(b.file).open("rb") as file_b:
            file_a.seek(a.start)
            file_b.seek(b.start)
            left = a.num_bytes
            while left > 0:
                size = min(left, _HASH_CHUNK_BYTES)
                chunk = file_a.read(size)
                if not chunk or chunk != file_b.read(size):
                    return False
                left -= len(chunk)
        return True

    # --- identity ----------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that name this config and these weights, wherever they lie and whatever the folder is called.

        SHA-256 over the config (without what only says where it came from and which software wrote it) and over the
        SHA-256 of each safetensors file. The hub knows the latter; of a folder the files are read once (with the
        ``progress`` given to :meth:`open`) and the result is remembered under :func:`cache_folder`.

        Raises:
            CheckpointError: a file is neither here nor known to the hub.
        """
        hashes = self._source.sha256(self._files, self._progress)
        identity = {
            "config": _without_volatile(self._raw_config),
            "files": sorted(hashes.items()),
        }
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


_AGAIN: Final = "copy or download the checkpoint again"


def resolve_dtype(name: str | torch.dtype, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype to compute in, from a user's word: ``auto`` is the checkpoint's own.

    Raises:
        CheckpointError: ``name`` is not a dtype that models run in.
    """
    if isinstance(name, torch.dtype):
        dtype = name
    elif name == "auto":
        dtype = checkpoint.dtype
    else:
        dtype = getattr(torch, name, torch.uint8)
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"models can't run in {name}: use auto, float32, bfloat16 or float16")
    return dtype


# --- reading files ----------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is too large to be what its name says: {_AGAIN}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON: {_AGAIN}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object: {_AGAIN}")
    return value


def _parse_config(path: Path, source: _Source) -> PreTrainedConfig:
    from transformers import AutoConfig

    raw = _read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} names no model_type: it is not the config of a Transformers model")
    try:
        config = AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        from transformers import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"{source} is of type {model_type}, which this version of Transformers does not know "
                "(code that comes with a checkpoint is never run): upgrade transformers or choose another model"
            ) from None
        raise CheckpointError(f"the config of {source} can't be read: {_one_line(error)}") from None
    return config


def _parse_generation_config(source: _Source) -> GenerationConfig | None:
    from transformers import GenerationConfig

    path = source.find("generation_config.json")
    if path is None:
        return None
    try:
        return GenerationConfig.from_pretrained(str(path.parent), local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} can't be read: {_one_line(error)}") from None


def _find_weights(source: _Source) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which file holds which tensor, and all files."""
    if source.has(_WEIGHTS):
        return dict.fromkeys(source.tensor_names(_WEIGHTS), _WEIGHTS), (_WEIGHTS,)
    index_path = source.find(_INDEX)
    if index_path is not None:
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path} has no weight_map: {_AGAIN}")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise CheckpointError(f"{index_path} puts {name} into something that is no safetensors file: {_AGAIN}")
        return weight_map, tuple(sorted(set(weight_map.values())))
    if any(source.has(file) for file in _PICKLED):
        raise CheckpointError(
            f"{source} has its weights pickled, which is not safe to load: "
            "use a safetensors version of it, or convert it with save_pretrained where you trust it"
        )
    raise CheckpointError(f"{source} has no {_WEIGHTS} and no {_INDEX}: only safetensors checkpoints can be used")


def _read_header(path: Path, file: str) -> dict[str, TensorEntry]:
    """The table of contents of a safetensors file, checked against the file's size.

    Source: the format's description at https://github.com/huggingface/safetensors#format
    """
    try:
        with path.open("rb") as stream:
            return _parse_header(stream, path, file)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {_AGAIN}") from None
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
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {_AGAIN}")
    try:
        raw = json.loads(stream.read(header_bytes))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} has a broken header: {_AGAIN}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} has a broken header: {_AGAIN}")
    offset = 8 + header_bytes
    entries: dict[str, TensorEntry] = {}
    for name, value in raw.items():
        if name == "__metadata__":
            continue
        entry = _parse_entry(name, value, file, offset)
        if entry is None:
            raise CheckpointError(f"{path} describes its tensor {name} in a way that can't be read: {_AGAIN}")
        if entry.end > size:
            raise CheckpointError(f"{path} is truncated ({size:,} bytes, {entry.end:,} expected): {_AGAIN}")
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


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE_KEYS}
    if isinstance(value, list):
        return [_without_volatile(item) for item in value]
    return value


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


# --- where checkpoints lie --------------------------------------------------------------------------------------------


class _Source(Protocol):
    """A place that holds a checkpoint's files."""

    name: str
    revision: str | None

    def has(self, file: str) -> bool:
        """Whether the checkpoint has such a file, here or to be downloaded."""

    def find(self, file: str) -> Path | None:
        """The path of a small file (downloaded first), None if the checkpoint has none of that name."""

    def path(self, file: str) -> Path:
        """The path of a file that the checkpoint must have (downloaded first)."""

    def tensor_names(self, file: str) -> list[str]:
        """Names of the tensors in a safetensors file, without downloading the rest of it."""

    def sha256(self, files: tuple[str, ...], progress: ProgressCallback | None) -> dict[str, str]:
        """SHA-256 of each file's content as hex."""


class _Folder:
    """A checkpoint in a local folder."""

    revision: str | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self.name = self._folder.name

    def __str__(self) -> str:
        return str(self._folder)

    def has(self, file: str) -> bool:
        return (self._folder / file).exists()

    def find(self, file: str) -> Path | None:
        path = self._folder / file
        return path if path.is_file() else None

    def path(self, file: str) -> Path:
        path = self._folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing although the checkpoint's index names it: {_AGAIN}")
        return path

    def tensor_names(self, file: str) -> list[str]:
        return list(_read_header(self.path(file), file))

    def sha256(self, files: tuple[str, ...], progress: ProgressCallback | None) -> dict[str, str]:
        hashes: dict[str, str] = {}
        for file in files:
            path = self._folder / file
            downloaded = None if path.exists() else self._downloaded_sha256(file)
            hashes[file] = downloaded if downloaded is not None else file_sha256(self.path(file), progress)
        return hashes

    def _downloaded_sha256(self, file: str) -> str | None:
        """What ``hf download --local-dir`` noted about a file that has been removed since, if it was a SHA-256.

        The second line of the note is the file's ETag, which for large files is the SHA-256 of the content.
        """
        note = self._folder / ".cache" / "huggingface" / "download" / f"{file}.metadata"
        try:
            lines = note.read_text().splitlines()
        except (OSError, ValueError):
            return None
        return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None


class _Hub:
    """A checkpoint in a repository on the Hugging Face hub, pinned to one commit when it is opened."""

    def __init__(
        self, name: str, *, revision: str | None, token: str | None, cache_dir: str | None, local_files_only: bool
    ) -> None:
        from huggingface_hub import constants

        self.name = name
        self._token = token
        self._cache_dir = cache_dir
        self._is_offline = local_files_only or bool(constants.HF_HUB_OFFLINE)
        self._sha256_of: dict[str, str] | None = None
        """None as long as the hub was not asked."""
        self._all_files: frozenset[str] | None = None
        self._asked_revision = revision
        commit = None if self._is_offline else self._ask_hub(revision)
        self.revision: str | None = commit if commit is not None else self._cached_commit(revision)

    def __str__(self) -> str:
        return self.name

    # The hub's own names for what can go wrong, in one line for the user. Everything else (no network, a proxy's
    # answer, a time-out) means that the hub was not reached.
    def _fail(self, error: Exception, doing: str) -> NoReturn:
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            raise CheckpointError(
                f"{self.name} asks for permission: accept its terms on huggingface.co and log in with `hf auth login`"
            ) from None
        if isinstance(error, errors.RepositoryNotFoundError):
            raise CheckpointError(
                f"there is no model {self.name} on the hub (nor a folder of that name), or it is private: "
                "check the name, and log in with `hf auth login` if it is private"
            ) from None
        if isinstance(error, errors.RevisionNotFoundError):
            raise CheckpointError(f"{self.name} has no revision {self._asked_revision}: check the revision") from None
        if isinstance(error, errors.HFValidationError):
            raise CheckpointError(
                f"{self.name} is neither a folder nor a name on the hub: check the model's name"
            ) from None
        raise CheckpointError(
            f"the hub could not be reached {doing} ({_one_line(error)}): check the network, or give a local folder"
        ) from None

    def _ask_hub(self, revision: str | None) -> str | None:
        """Learn the commit and the hashes of its files; None where there is no network but perhaps a cache."""
        from huggingface_hub import HfApi, errors

        try:
            info = HfApi(token=self._token).model_info(self.name, revision=revision, files_metadata=True, timeout=10)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
            self._fail(error, f"for {self.name}")
        except Exception as error:
            if self._find_cached("config.json", revision) is None:
                self._fail(error, f"for {self.name}")
            self._is_offline = True
            return None
        siblings = info.siblings or []
        self._all_files = frozenset(sibling.rfilename for sibling in siblings)
        hashes = {sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs is not None}
        self._sha256_of = {file: value for file, value in hashes.items() if _SHA256.fullmatch(value)}
        if info.sha is not None and self._sha256_of:
            _write_json(_hub_note(self.name, info.sha), self._sha256_of)
        return info.sha

    def _find_cached(self, file: str, revision: str | None) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        try:
            path = try_to_load_from_cache(self.name, file, cache_dir=self._cache_dir, revision=revision)
        except Exception as error:
            self._fail(error, f"for {file}")
        return Path(path) if isinstance(path, str) else None

    def _cached_commit(self, revision: str | None) -> str | None:
        path = self._find_cached("config.json", revision)
        if path is None:
            raise CheckpointError(
                f"{self.name} is neither a folder nor among the models downloaded before, and the hub was not asked: "
                "check the name, or go online once"
            )
        commit = path.parent.name
        return commit if _COMMIT.fullmatch(commit) else revision

    def has(self, file: str) -> bool:
        if self._all_files is not None:
            return file in self._all_files
        return self._find_cached(file, self.revision) is not None

    def find(self, file: str) -> Path | None:
        return self.path(file) if self.has(file) else None

    def path(self, file: str) -> Path:
        from huggingface_hub import errors, hf_hub_download

        cached = self._find_cached(file, self.revision)
        if cached is not None:
            return cached
        try:
            return Path(
                hf_hub_download(
                    self.name,
                    file,
                    revision=self.revision,
                    cache_dir=self._cache_dir,
                    token=self._token,
                    local_files_only=self._is_offline,
                )
            )
        except errors.LocalEntryNotFoundError as error:
            if not self._is_offline:
                self._fail(error, f"for {file} of {self.name}")
            raise CheckpointError(
                f"{file} of {self.name} was not downloaded yet and the hub was not asked: go online once"
            ) from None
        except errors.EntryNotFoundError:
            raise CheckpointError(f"{self.name} lacks {file} although its index names it: {_AGAIN}") from None
        except OSError as error:
            if isinstance(error, errors.HfHubHTTPError) or error.errno is None:
                self._fail(error, f"for {file} of {self.name}")
            raise CheckpointError(
                f"{file} of {self.name} can't be stored ({error.strerror}): make room or choose another HF_HOME"
            ) from None
        except Exception as error:
            self._fail(error, f"for {file} of {self.name}")

    def tensor_names(self, file: str) -> list[str]:
        if self._find_cached(file, self.revision) is not None or self._is_offline:
            return list(_read_header(self.path(file), file))
        from huggingface_hub import HfApi, errors

        try:
            api = HfApi(token=self._token)
            return list(api.parse_safetensors_file_metadata(self.name, file, revision=self.revision).tensors)
        except errors.SafetensorsParsingError:
            raise CheckpointError(f"{file} of {self.name} has a broken header: choose another revision") from None
        except Exception as error:
            self._fail(error, f"for the header of {file} of {self.name}")

    def sha256(self, files: tuple[str, ...], progress: ProgressCallback | None) -> dict[str, str]:
        known = self._sha256_of
        if known is None and self.revision is not None:
            note = _read_note(_hub_note(self.name, self.revision))
            known = {file: value for file, value in note.items() if isinstance(value, str) and _SHA256.fullmatch(value)}
        hashes: dict[str, str] = {}
        for file in files:
            value = (known or {}).get(file)
            if value is None:
                path = self.path(file)
                # In the hub's cache, entries are links to blobs that are named by their ETag: of large files, their
                # SHA-256; of small ones kept in git itself, something shorter.
                blob = path.resolve()
                is_named_by_hash = blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) is not None
                value = blob.name if is_named_by_hash else file_sha256(path, progress)
            hashes[file] = value
        return hashes


# --- hashes, remembered -----------------------------------------------------------------------------------------------


def _hub_note(name: str, commit: str) -> Path:
    key = hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()
    return cache_folder() / "hub" / f"{key}.json"


def file_sha256(path: Path, progress: ProgressCallback | None = None) -> str:
    """SHA-256 of a file's content as hex. Reads the file once and remembers the result until the file changes.

    Several processes that ask at the same time wait for the first one's answer.

    Raises:
        CheckpointError: the file can't be read.
    """
    real = path.resolve()
    try:
        before = real.stat()
        key = json.dumps([str(real), before.st_size, before.st_mtime_ns, before.st_ino])
        note = cache_folder() / "sha256" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        if (known := _noted_sha256(note)) is not None:
            return known
        with _lock(note):
            if (known := _noted_sha256(note)) is not None:
                return known
            digest = hashlib.sha256()
            with real.open("rb", buffering=0) as file:
                done = 0
                buffer = bytearray(_HASH_CHUNK_BYTES)
                view = memoryview(buffer)
                while count := file.readinto(buffer):
                    digest.update(view[:count])
                    done += count
                    if progress is not None:
                        progress(f"hash {path.name}", done, before.st_size)
            after = real.stat()
            is_settled = time.time_ns() - after.st_mtime_ns > _SETTLED_NS
            if is_settled and (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                _write_json(note, {"sha256": digest.hexdigest()})
            return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from None


def _noted_sha256(note: Path) -> str | None:
    value = _read_note(note).get("sha256")
    return value if isinstance(value, str) and _SHA256.fullmatch(value) else None


def _read_note(path: Path) -> dict[str, Any]:
    """A remembered value, or nothing: notes can always be worked out again."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: object) -> None:
    """Write a note so that readers see all of it or nothing. Where nothing can be written, nothing is remembered."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(value, file)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError:
        return


@contextmanager
def _lock(note: Path) -> Iterator[None]:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    lock = note.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError:
        yield  # a cache folder that can't be written to: each process works the value out for itself
        return
    with WeakFileLock(lock):
        yield
