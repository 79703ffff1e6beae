"""TLS 1.3 whose certificate is the peer's identity: contexts, the other end's identity, and TLS over byte strings.

The certificate is self-signed with the identity's Ed25519 key. No authority vouches for it: what counts is the key, and
TLS itself proves that the other end holds it. Python can't ask a dialer for a self-signed certificate, so TLS
authenticates the listener alone and the dialer signs in the hello (``docs/protocol.md``).
"""

from __future__ import annotations

import datetime
import os
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from petals_core.errors import AuthenticationError, PeerConnectionError, ProtocolError, VersionMismatchError
from petals_core.identity import Identity
from petals_core.wire.messages import Buffer

ALPN = "petals/1"
"""Name of the protocol's major version in the TLS handshake (RFC 7301)."""
MAX_CERTIFICATE_BYTES = 4096
_MAX_RECORD_BYTES = 16384  # of plaintext, RFC 8446 section 5.1
_NOT_BEFORE = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # "never", RFC 5280 section 4.1.2.5
_OLD_TLS = frozenset({"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "NO_PROTOCOLS_AVAILABLE"})


def listener_context(identity: Identity) -> ssl.SSLContext:
    """TLS settings of a listener that shows ``identity``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _set_common(context)
    context.num_tickets = 0  # sessions are not resumed: tickets would cost bytes and work on every connection
    password = os.urandom(32).hex()
    key = identity.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password.encode()),
    )
    # The ssl module reads keys from files only: a private folder, and a key that only this process can decrypt.
    with tempfile.TemporaryDirectory(prefix="petals-") as folder:
        path = Path(folder) / "identity.pem"
        path.write_bytes(key + _certificate(identity).public_bytes(serialization.Encoding.PEM))
        context.load_cert_chain(path, password=password)
    return context


def dialer_context() -> ssl.SSLContext:
    """TLS settings of a dialer. Any certificate passes: the caller compares ``TlsChannel.peer_public_key``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _set_common(context)
    return context


def public_key_of(certificate: bytes) -> bytes:
    """Return the Ed25519 key (32 bytes) of a DER certificate from an untrusted peer.

    Raises:
        AuthenticationError: it is no self-signed Ed25519 certificate.
    """
    if len(certificate) > MAX_CERTIFICATE_BYTES:
        raise AuthenticationError("the other end is no Petals peer: its certificate is too large")
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise AuthenticationError("the other end is no Petals peer: its certificate has no Ed25519 key")
        parsed.verify_directly_issued_by(parsed)
    except (ValueError, TypeError, x509.InvalidVersion, InvalidSignature) as error:
        raise AuthenticationError("the other end is no Petals peer: its certificate is not self-signed") from error
    return key.public_bytes_raw()


class TlsChannel:
    """One end of a TLS connection as a value machine: ciphertext in, plaintext out, and the reverse.

    This and no stream of the event loop's own, because a peer that vanishes then leaves no shutdown timer behind, and
    because asyncio and uvloop behave alike.
    """

    __slots__ = ("_incoming", "_outgoing", "_tls", "is_open")

    def __init__(self, context: ssl.SSLContext, *, is_listener: bool) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_listener)
        self.is_open = False
        """Whether the handshake is over."""

    def handshake(self, ciphertext: Buffer = b"") -> bool:
        """Go on with the handshake; tell whether it is over. ``take_outgoing`` must be sent then, even on an error.

        Raises:
            VersionMismatchError: the other end speaks another version of TLS or of Petals.
            ProtocolError: the other end speaks something else, or the bytes were damaged.
        """
        self._incoming.write(ciphertext)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            reason = _reason(error)
            if error.reason in _OLD_TLS:
                raise VersionMismatchError(f"the other end does not speak TLS 1.3 ({reason})") from error
            raise ProtocolError(f"the other end does not speak the Petals protocol ({reason})") from error
        if self._tls.selected_alpn_protocol() != ALPN:
            raise VersionMismatchError(f"the other end does not speak {ALPN}: it is no Petals peer, or a newer one")
        self.is_open = True
        return True

    def peer_public_key(self) -> bytes:
        """The listener's key, that TLS has proved it holds; for dialers, after the handshake.

        Raises:
            AuthenticationError: the certificate is not of the kind that peers have.
        """
        certificate = self._tls.getpeercert(binary_form=True)
        if certificate is None:
            raise AuthenticationError("the other end is no Petals peer: it has no certificate")
        return public_key_of(certificate)

    def decrypt(self, ciphertext: Buffer) -> bytes:
        """Take what came from the network and return the plaintext that is complete, perhaps none.

        Raises:
            PeerConnectionError: the other end has closed its direction, or the bytes were damaged on the way.
        """
        incoming, read = self._incoming, self._tls.read
        incoming.write(ciphertext)
        parts = []
        try:
            while incoming.pending:
                # A read takes one record, so nothing stays behind in the TLS object when ``incoming`` is empty.
                part = read(_MAX_RECORD_BYTES)
                if not part:
                    raise PeerConnectionError("the other end closed the connection")
                parts.append(part)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise PeerConnectionError(f"the connection was damaged on the way ({_reason(error)})") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def encrypt(self, plaintext: Buffer) -> bytes:
        """Return the ciphertext of ``plaintext``, behind what TLS itself has to say."""
        self._tls.write(plaintext)
        return self._outgoing.read()

    def take_outgoing(self) -> bytes:
        """What TLS itself has to say: handshake messages, alerts, key updates; often nothing."""
        return self._outgoing.read() if self._outgoing.pending else b""


def _set_common(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    context.options |= ssl.OP_NO_COMPRESSION


def _certificate(identity: Identity) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "petals")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(identity.key.public_key())
        .serial_number(1)  # nobody looks it up; a constant makes handshakes of one size
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .sign(identity.key, None)
    )


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "TLS error").replace("_", " ").lower()
