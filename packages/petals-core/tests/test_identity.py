import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from petals_core.errors import ConfigurationError
from petals_core.identity import Identity, PeerId, data_folder, verify

POSIX = pytest.mark.skipif(os.name != "posix", reason="file modes")


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_reads_as_it_is_written(digest: bytes) -> None:
    peer_id = PeerId(digest)
    text = str(peer_id)
    assert len(text) == 52
    assert text == text.lower()
    assert PeerId.parse(text) == PeerId.parse(text.upper()) == peer_id
    assert peer_id.short == text[:8]


@pytest.mark.parametrize("text", ["", "abc", "a" * 51, "a" * 53, "1" * 52, "é" * 52, "=" * 52])
def test_what_is_no_peer_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        PeerId.parse(text)


def test_a_peer_id_is_bound_to_its_key() -> None:
    known = PeerId.of_public_key(bytes(32))
    assert str(known) == str(PeerId.of_public_key(bytes(32)))
    assert known != PeerId.of_public_key(bytes(31) + b"\x01")
    with pytest.raises(ConfigurationError):
        PeerId(b"short")


def test_signatures_are_of_one_content_by_one_key() -> None:
    identity, other = Identity.ephemeral(), Identity.ephemeral()
    signature = identity.sign(b"content")
    assert verify(identity.public_key, signature, b"content")
    assert not verify(identity.public_key, signature, b"contend")
    assert not verify(other.public_key, signature, b"content")
    assert not verify(identity.public_key[:-1], signature, b"content")
    assert not verify(identity.public_key, signature + b"x", b"content")
    assert not verify(b"\xff" * 32, signature, b"content")


def test_a_stored_identity_is_made_once_and_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "my.key"
    first = Identity.load(path)
    with pytest.raises(ConfigurationError, match="in use by another process"):
        Identity.load(path)
    first.release()
    again = Identity.load(path)
    assert again.peer_id == first.peer_id
    again.release()


@POSIX
def test_a_stored_key_is_private(tmp_path: Path) -> None:
    path = tmp_path / "my.key"
    Identity.load(path).release()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        Identity.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_is_no_key_is_refused_and_let_go(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.key"
    path.write_bytes(content)
    path.chmod(0o600)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="not a private key"):
            Identity.load(path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.key"
    path.write_bytes(
        X25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="not an Ed25519 key"):
        Identity.load(path)


def test_an_identity_can_not_be_stored_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="can't be used"):
        Identity.load(tmp_path / "file" / "my.key")


def test_defaults_are_stable_and_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_DATA_DIR", str(tmp_path))
    assert data_folder() == tmp_path
    first, second = Identity.default("server"), Identity.default("server")
    assert first.peer_id != second.peer_id
    first.release()
    again = Identity.default("server")
    assert again.peer_id == first.peer_id
    for identity in (again, second):
        identity.release()
