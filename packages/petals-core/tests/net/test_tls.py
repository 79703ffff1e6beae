"""TLS over byte strings: what two ends agree on, and what is refused."""

from __future__ import annotations

import datetime
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from petals_core.errors import AuthenticationError, PeerConnectionError, ProtocolError, VersionMismatchError
from petals_core.identity import Identity
from petals_core.net.tls import ALPN, TlsChannel, dialer_context, listener_context, public_key_of


def connect(identity: Identity) -> tuple[TlsChannel, TlsChannel]:
    """Return dialer and listener behind a finished handshake."""
    dialer = TlsChannel(dialer_context(), is_listener=False)
    listener = TlsChannel(listener_context(identity), is_listener=True)
    dialer.handshake()
    while not (dialer.is_open and listener.is_open):
        if not listener.is_open:
            listener.handshake(dialer.take_outgoing())
        if not dialer.is_open:
            dialer.handshake(listener.take_outgoing())
    return dialer, listener


def certificate(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, signer: object = None) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2040, 1, 1, tzinfo=datetime.UTC))
    )
    signing_key = signer or key
    algorithm = hashes.SHA256() if isinstance(signing_key, ec.EllipticCurvePrivateKey) else None
    return builder.sign(signing_key, algorithm).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]


def test_dialer_learns_the_listeners_key() -> None:
    identity = Identity.ephemeral()
    dialer, _ = connect(identity)
    assert dialer.peer_public_key() == identity.public_key


@pytest.mark.parametrize("size", [1, 16384, 16385, 300_000])
def test_bytes_pass_both_ways(size: int) -> None:
    dialer, listener = connect(Identity.ephemeral())
    content = bytes(range(256)) * (size // 256 + 1)
    assert listener.decrypt(dialer.encrypt(content[:size])) == content[:size]
    assert dialer.decrypt(listener.encrypt(content[:size])) == content[:size]


def test_ciphertext_may_be_split_anywhere() -> None:
    dialer, listener = connect(Identity.ephemeral())
    ciphertext = dialer.encrypt(b"split") + dialer.encrypt(b"me")
    assert b"".join(listener.decrypt(ciphertext[i : i + 1]) for i in range(len(ciphertext))) == b"splitme"


def test_damaged_ciphertext_ends_the_connection() -> None:
    dialer, listener = connect(Identity.ephemeral())
    ciphertext = bytearray(dialer.encrypt(b"content"))
    ciphertext[-1] ^= 1
    with pytest.raises(PeerConnectionError, match="damaged"):
        listener.decrypt(ciphertext)


def test_repeated_ciphertext_ends_the_connection() -> None:
    dialer, listener = connect(Identity.ephemeral())
    ciphertext = dialer.encrypt(b"content")
    listener.decrypt(ciphertext)
    with pytest.raises(PeerConnectionError, match="damaged"):
        listener.decrypt(ciphertext)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\0" * 100, b"SSH-2.0-OpenSSH_9\r\n"])
def test_another_protocol_is_named_as_such(garbage: bytes) -> None:
    for channel in (
        TlsChannel(dialer_context(), is_listener=False),
        TlsChannel(listener_context(Identity.ephemeral()), is_listener=True),
    ):
        with pytest.raises(ProtocolError, match="does not speak"):
            channel.handshake(garbage)


def test_old_tls_is_a_version_mismatch() -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    dialer = TlsChannel(old, is_listener=False)
    dialer.handshake()
    with pytest.raises(VersionMismatchError, match=r"TLS 1\.3"):
        TlsChannel(listener_context(Identity.ephemeral()), is_listener=True).handshake(dialer.take_outgoing())


def test_tls_server_of_another_kind_is_a_version_mismatch() -> None:
    other = listener_context(Identity.ephemeral())
    other.set_alpn_protocols(["http/1.1"])
    dialer = TlsChannel(dialer_context(), is_listener=False)
    listener = TlsChannel(other, is_listener=True)
    dialer.handshake()
    listener.handshake(dialer.take_outgoing())
    with pytest.raises(VersionMismatchError, match=ALPN):
        dialer.handshake(listener.take_outgoing())


def test_key_comes_from_the_certificate() -> None:
    key = Ed25519PrivateKey.generate()
    assert public_key_of(certificate(key)) == key.public_key().public_bytes_raw()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "self-signed"),
        (b"\x30\x03\x02\x01\x01", "self-signed"),
        (bytes(5000), "too large"),
        (certificate(ec.generate_private_key(ec.SECP256R1())), "no Ed25519 key"),
        (certificate(Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()), "self-signed"),
    ],
)
def test_other_certificates_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(AuthenticationError, match=reason):
        public_key_of(content)
