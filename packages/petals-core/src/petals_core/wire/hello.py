"""The hello: how two peers agree on a version, prove who they are and tell their limits, on a fresh TLS connection.

The listener is authenticated by TLS (its certificate's Ed25519 key is its identity), the dialer by a signature here.
Every part has a fixed layout (``docs/protocol.md``): greeting -> answer -> welcome or refusal, one round trip. Both
sides are value machines: nonces are arguments, and deadlines are the shell's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from petals_core.errors import AuthenticationError, PetalsError, ProtocolError, VersionMismatchError
from petals_core.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId, verify
from petals_core.limits import MIB, WireLimits
from petals_core.swarm_key import PROOF_BYTES, SwarmKey
from petals_core.wire.frames import MAX_ERROR_BYTES, decode_error, encode_error

MAGIC: Final = b"\x89petals\n"
"""First bytes of both sides; no text protocol starts so, and a transfer that changes line ends breaks it."""
VERSIONS: Final = (1, 1)
"""The oldest and the newest protocol version that this code speaks."""
NONCE_BYTES: Final = 32

_GREETING = struct.Struct(f">8sHH{NONCE_BYTES}s")
_LIMITS = struct.Struct(">6I")
_CORE = struct.Struct(f">8sH{PUBLIC_KEY_BYTES}s{NONCE_BYTES}s{_LIMITS.size}s")
"""The dialer's answer without its two proofs: magic, version, public key, nonce, limits."""
_ANSWER_BYTES = _CORE.size + SIGNATURE_BYTES + PROOF_BYTES
_WELCOME = struct.Struct(f">B{PROOF_BYTES}s{_LIMITS.size}s")
_REFUSAL = struct.Struct(">BH")
_WELCOME_KIND = 1
_REFUSAL_KIND = 2
GREETING_BYTES: Final = _GREETING.size
ANSWER_BYTES: Final = _ANSWER_BYTES
WELCOME_BYTES: Final = _WELCOME.size

_SIGNATURE_CONTEXT = b"petals hello 1\0"
_DIALER_PURPOSE = b"hello dialer"
_LISTENER_PURPOSE = b"hello listener"
_NO_PROOF = bytes(PROOF_BYTES)
_LIMIT_RANGES = {
    "max_frame_bytes": (1024, 16 * MIB),
    "max_message_bytes": (1024, 1024 * MIB),
    "max_envelope_bytes": (1024, 16 * MIB),
    "max_streams": (0, 65536),
    "stream_credit_bytes": (1024, 1024 * MIB),
    "connection_credit_bytes": (1024, 1024 * MIB),
}
"""What both sides refuse to tell and to be told: room for one error at least, and sums that fit 32 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloResult:
    """What a finished hello establishes."""

    peer_id: PeerId
    """The other end, authenticated."""
    version: int
    remote_limits: WireLimits
    """The bounds that the other end puts on what is sent to it; its timeouts are not told, and stand at defaults."""
    trailing: bytes
    """What arrived behind the hello: the first bytes for ``Connection.receive_data``."""


class DialerHello:
    """The dialer's side. Feed what arrives, send what ``data_to_send`` gives, until ``result`` is there.

    ``listener_id`` is derived from the key of the listener's TLS certificate; the caller has compared it with the id
    that it expected. ``nonce`` is 32 fresh random bytes.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        listener_id: PeerId,
        nonce: bytes,
        swarm_key: SwarmKey | None = None,
        limits: WireLimits | None = None,
        versions: tuple[int, int] = VERSIONS,
    ) -> None:
        self.result: HelloResult | None = None
        raise NotImplementedError

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the listener.

        Raises:
            VersionMismatchError: the listener speaks another protocol, or no version that we speak.
            AuthenticationError: the listener does not know the swarm's key, or we are refused for ours.
            ProtocolError: the bytes are no hello.
            PetalsError: the listener's refusal, as it stated it (``OverloadedError``, ``DrainingError``, ...).
        """
        raise NotImplementedError

    def data_to_send(self) -> bytes:
        """Return and forget what is to be sent now."""
        raise NotImplementedError


class ListenerHello:
    """The listener's side; ``data_to_send`` has the greeting from the start. ``nonce`` is 32 fresh random bytes."""

    def __init__(
        self,
        *,
        identity: Identity,
        nonce: bytes,
        swarm_key: SwarmKey | None = None,
        limits: WireLimits | None = None,
        versions: tuple[int, int] = VERSIONS,
    ) -> None:
        self.result: HelloResult | None = None
        raise NotImplementedError

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the dialer. Before an error is raised, ``data_to_send`` has the refusal that tells it.

        Raises:
            AuthenticationError: the dialer does not know the swarm's key, or its signature is wrong.
            VersionMismatchError: the dialer speaks another protocol, or chose a version that we don't speak.
            ProtocolError: the bytes are no hello.
        """
        raise NotImplementedError

    def refuse(self, error: PetalsError) -> None:
        """Make ``data_to_send`` give a refusal (too many connections, draining); the hello is over then."""
        raise NotImplementedError

    def data_to_send(self) -> bytes:
        """Return and forget what is to be sent now."""
        raise NotImplementedError
