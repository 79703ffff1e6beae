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
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch

from petals_core.errors import CheckpointError
from petals_core.models.configs import read_config, read_generation_config
from petals_core.models.hashes import ProgressCallback
from petals_core.models.memory import HeapTrimmer
from petals_core.models.safetensors_file import COPY_AGAIN, TensorEntry, dtype_name, read_header, read_tensor
from petals_core.models.sources import Folder, Source, open_source, read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PICKLED: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.bin")
_HASH_CHUNK_BYTES: Final = 4 << 20
_VOLATILE_KEYS: Final = frozenset({"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"})
_FILE_NAME: Final = re.compile(r"[\w.+=@-]+\.safetensors")


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
        return dtype_name(self._checkpoint.entry(self.name).dtype)

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
        source: Source,
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
        max_disk_bytes: int | None = None,
        trust_remote_code: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Checkpoint:
        """Read the config and the index of a folder or of a repository on the hub; no weights yet.

        A path to an existing folder wins over a repository of the same name.

        Args:
            max_disk_bytes: what all downloads of this software may take in ``cache_dir``; None: the disk.
            trust_remote_code: whether code that comes with the checkpoint is run; such models are refused otherwise.
            progress: is told of downloads, hashing and reading.

        Raises:
            CheckpointError: there is no such model, it can't be reached, or its files are broken or not safetensors.
            UnsupportedModelError: this version of Transformers does not know the architecture.
        """
        source = open_source(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            max_disk_bytes=max_disk_bytes,
            progress=progress,
        )
        if revision is not None and isinstance(source, Folder):
            raise CheckpointError(f"{source} is a folder and has no revisions: leave the revision out")
        config_path = source.find("config.json")
        if config_path is None:
            raise CheckpointError(f"{source} has no config.json: it is not a Transformers checkpoint")
        raw_config = read_json(config_path)
        config = read_config(config_path, source, trust_remote_code=trust_remote_code)
        generation_config = read_generation_config(source)
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
            header = self._headers[file] = read_header(self._source.path(file), file)
        entry = header.get(name)
        if entry is None:
            raise CheckpointError(
                f"{file} of {self._source} lacks the tensor {name} that its index promises: {COPY_AGAIN}"
            )
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
        return read_tensor(self._source.path(entry.file), entry)

    def fetch(self, names: Iterable[str]) -> int:
        """Make sure that the files of these tensors are here (on the hub: download them) and whole.

        Returns:
            The size of the tensors in bytes, as stored.

        Raises:
            CheckpointError: a file is missing, broken, or can't be downloaded.
        """
        names = tuple(names)
        self._source.prepare(self.tensor_files(names))
        return sum(self.entry(name).num_bytes for name in names)

    def lazy(self, names: Mapping[str, str], *, num_bytes: int | None = None) -> dict[str, LazyTensor]:
        """Tensors by new name (the mapping's key) that are read from their files when they are indexed with ``[...]``.

        ``num_bytes`` is told to ``progress`` as the size of all that will be read.
        """
        progress = self._progress
        trimmer = HeapTrimmer()
        done = 0

        def report(entry: TensorEntry) -> None:
            nonlocal done
            done += entry.num_bytes
            trimmer.note(entry.num_bytes)
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


def _find_weights(source: Source) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which file holds which tensor, and all files."""
    if source.has(_WEIGHTS):
        return dict.fromkeys(source.tensor_names(_WEIGHTS), _WEIGHTS), (_WEIGHTS,)
    index_path = source.find(_INDEX)
    if index_path is not None:
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path} has no weight_map: {COPY_AGAIN}")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise CheckpointError(
                    f"{index_path} puts {name} into something that is no safetensors file: {COPY_AGAIN}"
                )
        return weight_map, tuple(sorted(set(weight_map.values())))
    if any(source.has(file) for file in _PICKLED):
        raise CheckpointError(
            f"{source} has its weights pickled, which is not safe to load: "
            "use a safetensors version of it, or convert it with save_pretrained where you trust it"
        )
    raise CheckpointError(f"{source} has no {_WEIGHTS} and no {_INDEX}: only safetensors checkpoints can be used")


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE_KEYS}
    if isinstance(value, list):
        return [_without_volatile(item) for item in value]
    return value
