"""Where checkpoints lie: a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

from petals_core.errors import CheckpointError
from petals_core.models.downloads import DownloadCache, RemoteFile, fail_to_write
from petals_core.models.hashes import ProgressCallback, cache_folder, file_sha256, is_sha256, read_note, write_note
from petals_core.models.safetensors_file import COPY_AGAIN, read_header

_MAX_JSON_BYTES: Final = 100_000_000
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_HUB_NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is too large to be what its name says: {COPY_AGAIN}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON: {COPY_AGAIN}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object: {COPY_AGAIN}")
    return value


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class Source(Protocol):
    """A place that holds a checkpoint's files."""

    name: str
    revision: str | None

    def has(self, file: str) -> bool:
        """Whether the checkpoint has such a file, here or to be downloaded."""

    def find(self, file: str) -> Path | None:
        """The path of a small file (downloaded first), None if the checkpoint has none of that name."""

    def path(self, file: str) -> Path:
        """The path of a file that the checkpoint must have (downloaded first)."""

    def code_files(self) -> list[str]:
        """Names of the Python files that come with the checkpoint."""

    def prepare(self, files: Iterable[str]) -> None:
        """Make sure that files that the checkpoint must have are here (downloaded first), room for all beforehand."""

    def tensor_names(self, file: str) -> list[str]:
        """Names of the tensors in a safetensors file, without downloading the rest of it."""

    def sha256(self, files: tuple[str, ...], progress: ProgressCallback | None) -> dict[str, str]:
        """SHA-256 of each file's content as hex."""


class Folder:
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
            raise CheckpointError(f"{path} is missing although the checkpoint's index names it: {COPY_AGAIN}")
        return path

    def code_files(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("*.py"))

    def prepare(self, files: Iterable[str]) -> None:
        for file in files:
            self.path(file)

    def tensor_names(self, file: str) -> list[str]:
        return list(read_header(self.path(file), file))

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
        return lines[1] if len(lines) > 1 and is_sha256(lines[1]) else None


class Hub:
    """A checkpoint in a repository on the Hugging Face hub, pinned to one commit when it is opened."""

    def __init__(
        self,
        name: str,
        *,
        revision: str | None,
        token: str | None,
        cache_dir: str | None,
        local_files_only: bool,
        max_disk_bytes: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        from huggingface_hub import constants

        self.name = name
        self._token = token
        self._cache_dir = cache_dir
        self._is_offline = local_files_only or bool(constants.HF_HUB_OFFLINE)
        self._progress = progress
        self._downloads = DownloadCache(Path(cache_dir or constants.HF_HUB_CACHE), name, max_disk_bytes=max_disk_bytes)
        self._remote_files: dict[str, RemoteFile] = {}
        """The files that are large, as the hub describes them."""
        self._sha256_of: dict[str, str] | None = None
        """None as long as the hub was not asked."""
        self._all_files: frozenset[str] | None = None
        self._asked_revision = revision
        commit = None if self._is_offline else self._ask_hub(revision)
        self.revision: str | None = commit if commit is not None else self._cached_commit(revision)
        if commit is not None and commit != revision and self.has("config.json"):
            # By the name that was given, so that huggingface_hub notes which commit it stands for, to be found offline.
            self._download("config.json", revision)

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
            f"the hub could not be reached {doing} ({one_line(error)}): check the network, or give a local folder"
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
        self._remote_files = {
            sibling.rfilename: RemoteFile(
                name=sibling.rfilename, sha256=sibling.lfs.sha256, num_bytes=int(sibling.lfs.size)
            )
            for sibling in siblings
            if sibling.lfs is not None and is_sha256(sibling.lfs.sha256)
        }
        self._sha256_of = {file: remote.sha256 for file, remote in self._remote_files.items()}
        if info.sha is not None and self._sha256_of:
            write_note(_hub_note(self.name, info.sha), self._sha256_of)
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
        cached = self._find_cached(file, self.revision)
        remote = self._remote_files.get(file)
        if remote is not None and (cached is None or cached.stat().st_size != remote.num_bytes):
            self.prepare([file])
            cached = self._find_cached(file, self.revision)
        return cached if cached is not None else self._download(file, self.revision)

    def code_files(self) -> list[str]:
        if self._all_files is not None:
            return sorted(file for file in self._all_files if file.endswith(".py") and "/" not in file)
        config = self._find_cached("config.json", self.revision)
        return [] if config is None else sorted(path.name for path in config.parent.glob("*.py"))

    def prepare(self, files: Iterable[str]) -> None:
        files = tuple(files)
        remotes = {file: remote for file in files if (remote := self._remote(file)) is not None}
        self._downloads.reserve(remotes.values())
        for file in files:
            remote = remotes.get(file)
            if remote is not None and not self._downloads.is_complete(remote) and not self._is_offline:
                self._downloads.download(remote, self._url(file), self._headers(), self._progress)
            if self._find_cached(file, self.revision) is None:
                self._download(file, self.revision)  # Of what is here only a link is made.

    def _remote(self, file: str) -> RemoteFile | None:
        """A large file as the hub describes it, or as it lies here where the hub is not asked."""
        if (remote := self._remote_files.get(file)) is not None:
            return remote
        cached = self._find_cached(file, self.revision)
        if cached is None or not is_sha256(cached.resolve().name):
            return None
        return RemoteFile(name=file, sha256=cached.resolve().name, num_bytes=cached.stat().st_size)

    def _url(self, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, file, revision=self.revision)

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        return build_hf_headers(token=self._token)

    def _download(self, file: str, revision: str | None) -> Path:
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(
                hf_hub_download(
                    self.name,
                    file,
                    revision=revision,
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
            raise CheckpointError(f"{self.name} lacks {file} although its index names it: {COPY_AGAIN}") from None
        except OSError as error:
            if isinstance(error, errors.HfHubHTTPError) or error.errno is None:
                self._fail(error, f"for {file} of {self.name}")
            fail_to_write(self._downloads.folder, error)
        except Exception as error:
            self._fail(error, f"for {file} of {self.name}")

    def tensor_names(self, file: str) -> list[str]:
        if self._find_cached(file, self.revision) is not None or self._is_offline:
            return list(read_header(self.path(file), file))
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
            note = read_note(_hub_note(self.name, self.revision))
            known = {file: value for file, value in note.items() if isinstance(value, str) and is_sha256(value)}
        hashes: dict[str, str] = {}
        for file in files:
            value = (known or {}).get(file)
            if value is None:
                path = self.path(file)
                # In the hub's cache, entries are links to blobs that are named by their ETag: of large files, their
                # SHA-256; of small ones kept in git itself, something shorter.
                blob = path.resolve()
                is_named_by_hash = blob.parent.name == "blobs" and is_sha256(blob.name)
                value = blob.name if is_named_by_hash else file_sha256(path, progress)
            hashes[file] = value
        return hashes


def _hub_note(name: str, commit: str) -> Path:
    key = hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()
    return cache_folder() / "hub" / f"{key}.json"


def open_source(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    max_disk_bytes: int | None = None,
    progress: ProgressCallback | None = None,
) -> Source:
    """An existing folder, or else a repository of that name on the hub; ``revision`` and what follows is for the hub.

    Raises:
        CheckpointError: there is no such folder and the name can't be one on the hub, or the hub can't be reached.
    """
    folder, name = Path(name_or_path), str(name_or_path)
    if folder.is_dir():
        return Folder(folder)
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"there is no folder {name}: check the path, or give a hub name like owner/name")
    return Hub(
        name,
        revision=revision,
        token=token,
        cache_dir=None if cache_dir is None else str(cache_dir),
        local_files_only=local_files_only,
        max_disk_bytes=max_disk_bytes,
        progress=progress,
    )
