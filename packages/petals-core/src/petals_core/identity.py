"""Who a peer is: an Ed25519 key, and the peer id derived from it."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import platformdirs
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock, Timeout

from petals_core.errors import ConfigurationError

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
_PEER_ID_CONTEXT = b"petals peer id 1\0"
_DERIVED_CONTEXT = b"petals derived identity 1\0"
_MAX_DEFAULT_IDENTITIES = 64


@dataclass(frozen=True, slots=True, order=True)
class PeerId:
    """SHA-256 of a peer's public key (32 bytes); its text is lower-case base32 without padding (52 characters)."""

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != hashlib.sha256().digest_size:
            raise ConfigurationError(f"a peer id has 32 bytes, not {len(self.digest)}")

    def __hash__(self) -> int:
        return hash(self.digest)  # which bytes remember; a dataclass would make a tuple each time

    @classmethod
    def of_public_key(cls, public_key: bytes) -> Self:
        """Derive the id of the peer that holds ``public_key`` (32 raw bytes)."""
        return cls(hashlib.sha256(_PEER_ID_CONTEXT + public_key).digest())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            ConfigurationError: ``text`` is not a peer id.
        """
        try:
            return cls(base64.b32decode(text.upper() + "===="))
        except ValueError as error:
            raise ConfigurationError(f"{text!r} is not a peer id: expected 52 letters and digits") from error

    @property
    def short(self) -> str:
        """The first 8 characters of the text, for people."""
        return str(self)[:8]

    def __str__(self) -> str:
        return base64.b32encode(self.digest).decode().rstrip("=").lower()


def verify(public_key: bytes, signature: bytes, content: bytes) -> bool:
    """Tell whether ``signature`` is of ``content`` by the holder of ``public_key``; False for malformed input."""
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


class Identity:
    """A peer's private key, and for a stored one the lock that keeps a second process from using it."""

    def __init__(self, key: Ed25519PrivateKey, lock: FileLock | None = None) -> None:
        self.key = key
        self.public_key: bytes = key.public_key().public_bytes_raw()
        self.peer_id = PeerId.of_public_key(self.public_key)
        self._lock = lock

    @classmethod
    def ephemeral(cls) -> Self:
        """Make an identity that is forgotten with the process."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the key at ``path``, or make one there with mode 0600, and hold it until the process ends.

        Raises:
            ConfigurationError: the file is no Ed25519 key, others may read it, it can't be read or written, or another
                process uses it.
        """
        identity = cls._try_load(path)
        if identity is None:
            raise ConfigurationError(f"identity {path} is in use by another process: give another file with --identity")
        return identity

    @classmethod
    def default(cls, role: str) -> Self:
        """Load this user's first identity for ``role`` ("server", "bootstrap", ...) that no running process uses.

        Several servers on one machine so get identities of their own that are stable over restarts.
        """
        folder = data_folder() / "identities"
        for number in range(1, _MAX_DEFAULT_IDENTITIES + 1):
            identity = cls._try_load(folder / f"{role}-{number}.key")
            if identity is not None:
                return identity
        raise ConfigurationError(
            f"{_MAX_DEFAULT_IDENTITIES} identities in {folder} are in use: give a file with --identity"
        )

    @classmethod
    def _try_load(cls, path: Path) -> Self | None:
        """Load or make the key at ``path``; None while another process holds it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(path.with_name(path.name + ".lock"), mode=0o600)
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            raise ConfigurationError(f"identity {path} can't be used: {error.strerror or error}") from error
        try:
            if not path.exists():
                _write_private(path, Ed25519PrivateKey.generate())
            return cls(_read_private(path), lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the key at ``path``, or make one there, without holding it: a server may use it at the same time.

        Raises:
            ConfigurationError: the file is no Ed25519 key, others may read it, or it can't be read or written.
        """
        if not path.exists():
            cls.load(path).release()
        return cls(_read_private(path))

    def derived(self, purpose: str) -> Self:
        """Another identity of the same owner, always the same one for a purpose."""
        seed = hashlib.sha256(_DERIVED_CONTEXT + purpose.encode() + b"\0" + self.key.private_bytes_raw()).digest()
        return type(self)(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, content: bytes) -> bytes:
        """Sign ``content`` (64 bytes)."""
        return self.key.sign(content)

    def release(self) -> None:
        """Let another process use the stored key."""
        if self._lock is not None:
            self._lock.release()


def data_folder() -> Path:
    """Where this user's keys live; ``PETALS_DATA_DIR`` overrides the platform's choice."""
    return Path(os.environ.get("PETALS_DATA_DIR") or platformdirs.user_data_dir("petals"))


def receipts_path(server: PeerId) -> Path:
    """Where a server of this user keeps its receipts."""
    return data_folder() / "receipts" / f"{server.short}.bin"


def _write_private(path: Path, key: Ed25519PrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigurationError(f"identity {path} can't be written: {error.strerror or error}") from error


def _read_private(path: Path) -> Ed25519PrivateKey:
    try:
        status = path.stat()
        if os.name == "posix" and status.st_mode & 0o077:
            raise ConfigurationError(f"identity {path} may be read by other users: run chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigurationError(f"identity {path} can't be read: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"identity {path} is not a private key in PEM form: remove it or give another"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(f"identity {path} is not an Ed25519 key: remove it or give another")
    return key
