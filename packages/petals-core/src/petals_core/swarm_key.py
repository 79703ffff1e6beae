"""The shared secret of a private swarm, and the proofs that a peer knows it."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from petals_core.errors import ConfigurationError

KEY_BYTES = 32
PROOF_BYTES = 32
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True, repr=False)
class SwarmKey:
    """32 secret bytes; a file holds them as 64 hexadecimal digits."""

    secret: bytes

    @classmethod
    def generate(cls) -> Self:
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a key file.

        Raises:
            ConfigurationError: the file can't be read or holds something else.
        """
        try:
            with path.open("rb") as file:
                secret = bytes.fromhex(file.read(_MAX_FILE_BYTES).decode("ascii").strip())
        except OSError as error:
            raise ConfigurationError(f"swarm key {path} can't be read: {error.strerror or error}") from error
        except ValueError:
            secret = b""
        if len(secret) != KEY_BYTES:
            raise ConfigurationError(
                f"swarm key {path} is not 64 hexadecimal digits: make one with 'openssl rand -hex 32'"
            )
        return cls(secret)

    def proof(self, purpose: bytes, *parts: bytes) -> bytes:
        """HMAC-SHA256 of length-prefixed ``parts`` under a key derived for ``purpose`` (32 bytes)."""
        derived = hmac.digest(self.secret, b"petals swarm key 1\0" + purpose, hashlib.sha256)
        return hmac.digest(derived, b"".join(len(part).to_bytes(4, "big") + part for part in parts), hashlib.sha256)

    def check(self, proof: bytes, purpose: bytes, *parts: bytes) -> bool:
        """Tell in constant time whether ``proof`` is of these parts."""
        return hmac.compare_digest(proof, self.proof(purpose, *parts))

    def __repr__(self) -> str:
        return "SwarmKey(...)"
