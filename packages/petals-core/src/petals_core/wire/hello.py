"""The hello: how two peers agree on a version, prove who they are and tell their limits, on a fresh TLS connection.

The listener is authenticated by TLS (its certificate's Ed25519 key is its identity), the dialer by a signature here.
Every part has a fixed layout (``docs/protocol.md``): greeting -> answer -> welcome or refusal, one round trip. Both
sides are value machines: nonces are arguments, and deadlines are the shell's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from petals_core.errors import AuthenticationError, ConfigurationError, PetalsError, ProtocolError, VersionMismatchError
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
_WELCOME = struct.Struct(f">B{PROOF_BYTES}s{_LIMITS.size}s")
"""Kind, proof, limits."""
_REFUSAL = struct.Struct(">BH")
"""Kind, and the bytes of the error that follows."""
_WELCOME_KIND = 1
_REFUSAL_KIND = 2
GREETING_BYTES: Final = _GREETING.size
ANSWER_BYTES: Final = _CORE.size + SIGNATURE_BYTES + PROOF_BYTES
WELCOME_BYTES: Final = _WELCOME.size

_SIGNATURE_CONTEXT = b"petals hello 1\0"
_DIALER_PURPOSE = b"hello dialer"
_LISTENER_PURPOSE = b"hello listener"
_NO_PROOF = bytes(PROOF_BYTES)
_PRIVATE = "the server is in a private swarm: give the swarm's key with --swarm-key"
_PUBLIC = "the server is not in a private swarm, but a swarm key is given: leave out --swarm-key, or ask another server"
_WRONG_KEY = "the swarm key given is not the one of the server's swarm"
_LIMIT_RANGES = {
    "max_frame_bytes": (1024, 16 * MIB),
    "max_message_bytes": (MAX_ERROR_BYTES, 1024 * MIB),
    "max_envelope_bytes": (MAX_ERROR_BYTES, 16 * MIB),
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
        self._identity = identity
        self._listener_id = listener_id
        self._nonce = _checked_nonce(nonce)
        self._swarm_key = swarm_key
        self._limits = limits or WireLimits()
        self._versions = versions
        self._received = bytearray()
        self._to_send = b""
        self._version = 0
        self._transcript: bytes | None = None

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the listener.

        Raises:
            VersionMismatchError: the listener speaks another protocol, or no version that we speak.
            AuthenticationError: the listener does not know the swarm's key, or we are refused for ours.
            ProtocolError: the bytes are no hello.
            PetalsError: the listener's refusal, as it stated it (``OverloadedError``, ``DrainingError``, ...).
        """
        assert self.result is None, "the hello is over"
        self._received += data
        if self._transcript is None:
            greeting = self._taken(GREETING_BYTES)
            if greeting is None:
                _check_magic(self._received, "the server")
                return
            self._transcript = self._answer(greeting)
        if self._received[:1] == bytes([_REFUSAL_KIND]):
            self._read_refusal()
        elif self._received and self._received[0] != _WELCOME_KIND:
            raise ProtocolError(f"the server's hello continues with unknown kind {self._received[0]}")
        else:
            self._read_welcome(self._transcript)

    def data_to_send(self) -> bytes:
        """Return and forget what is to be sent now."""
        result, self._to_send = self._to_send, b""
        return result

    def _taken(self, size: int) -> bytes | None:
        """Remove ``size`` bytes from what was received; None while there are fewer."""
        if len(self._received) < size:
            return None
        result = bytes(self._received[:size])
        del self._received[:size]
        return result

    def _answer(self, greeting: bytes) -> bytes:
        """Queue the answer to a greeting; returns the transcript that both sides prove."""
        _check_magic(greeting, "the server")
        _, oldest, newest, _ = _GREETING.unpack(greeting)
        self._version = min(newest, self._versions[1])
        if oldest > newest or self._version < max(oldest, self._versions[0]):
            raise VersionMismatchError(
                f"the server speaks protocol versions {oldest} to {newest} and this program {self._versions[0]} to "
                f"{self._versions[1]}: update the older one"
            )
        core = _CORE.pack(MAGIC, self._version, self._identity.public_key, self._nonce, _pack_limits(self._limits))
        transcript = _transcript(greeting, self._listener_id, core)
        proof = _NO_PROOF if self._swarm_key is None else self._swarm_key.proof(_DIALER_PURPOSE, transcript)
        self._to_send = core + proof + self._identity.sign(_SIGNATURE_CONTEXT + transcript + proof)
        return transcript

    def _read_welcome(self, transcript: bytes) -> None:
        welcome = self._taken(WELCOME_BYTES)
        if welcome is None:
            return
        _, proof, limits = _WELCOME.unpack(welcome)
        if self._swarm_key is None:
            if proof != _NO_PROOF:
                raise AuthenticationError(_PRIVATE)
        elif proof == _NO_PROOF:
            raise AuthenticationError(_PUBLIC)
        elif not self._swarm_key.check(proof, _LISTENER_PURPOSE, transcript):
            raise AuthenticationError(_WRONG_KEY)
        self.result = HelloResult(
            peer_id=self._listener_id,
            version=self._version,
            remote_limits=_unpack_limits(limits),
            trailing=bytes(self._received),
        )

    def _read_refusal(self) -> None:
        if len(self._received) < _REFUSAL.size:
            return
        _, size = _REFUSAL.unpack_from(self._received)
        if size > MAX_ERROR_BYTES:
            raise ProtocolError(f"refusal of {size} bytes is over {MAX_ERROR_BYTES}")
        if len(self._received) >= _REFUSAL.size + size:
            raise decode_error(bytes(self._received[_REFUSAL.size : _REFUSAL.size + size]))


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
        self._identity = identity
        self._swarm_key = swarm_key
        self._limits = limits or WireLimits()
        self._versions = versions
        self._received = bytearray()
        self._greeting = _GREETING.pack(MAGIC, *versions, _checked_nonce(nonce))
        self._to_send = self._greeting
        self._is_over = False

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the dialer. Before an error is raised, ``data_to_send`` has the refusal that tells it.

        Raises:
            AuthenticationError: the dialer does not know the swarm's key, or its signature is wrong.
            VersionMismatchError: the dialer speaks another protocol, or chose a version that we don't speak.
            ProtocolError: the bytes are no hello.
        """
        assert not self._is_over, "the hello is over"
        self._received += data
        try:
            if len(self._received) >= ANSWER_BYTES:
                self._read_answer(bytes(self._received[:ANSWER_BYTES]), bytes(self._received[ANSWER_BYTES:]))
            elif self._swarm_key is None:
                _check_magic(self._received, "the client")
        except PetalsError as error:
            self.refuse(error)
            raise

    def refuse(self, error: PetalsError) -> None:
        """Make ``data_to_send`` give a refusal (too many connections, draining); the hello is over then.

        Also once ``result`` says who the dialer is, as long as the welcome was not taken.
        """
        if self.result is not None and self._to_send:
            self.result, self._to_send, self._is_over = None, b"", False
        if not self._is_over:
            self._is_over = True
            text = encode_error(error)
            self._to_send += _REFUSAL.pack(_REFUSAL_KIND, len(text)) + text

    def data_to_send(self) -> bytes:
        """Return and forget what is to be sent now."""
        result, self._to_send = self._to_send, b""
        return result

    def _read_answer(self, answer: bytes, trailing: bytes) -> None:
        core, proof = answer[: _CORE.size], answer[_CORE.size : _CORE.size + PROOF_BYTES]
        transcript = _transcript(self._greeting, self._identity.peer_id, core)
        # Nothing of a peer that can't prove the swarm's key is looked at, not even the magic.
        if self._swarm_key is not None and not self._swarm_key.check(proof, _DIALER_PURPOSE, transcript):
            raise AuthenticationError(_PRIVATE if proof == _NO_PROOF else _WRONG_KEY)
        _check_magic(core, "the client")
        _, version, public_key, _, limits = _CORE.unpack(core)
        if not self._versions[0] <= version <= self._versions[1]:
            raise VersionMismatchError(
                f"the client chose protocol version {version} of {self._versions[0]} to {self._versions[1]}: "
                "update the older one"
            )
        if self._swarm_key is None and proof != _NO_PROOF:
            raise AuthenticationError(_PUBLIC)
        if not verify(public_key, answer[-SIGNATURE_BYTES:], _SIGNATURE_CONTEXT + transcript + proof):
            raise AuthenticationError("the client's signature is not by its key")
        remote_limits = _unpack_limits(limits)
        own_proof = _NO_PROOF if self._swarm_key is None else self._swarm_key.proof(_LISTENER_PURPOSE, transcript)
        self._to_send += _WELCOME.pack(_WELCOME_KIND, own_proof, _pack_limits(self._limits))
        self._is_over = True
        self.result = HelloResult(
            peer_id=PeerId.of_public_key(public_key), version=version, remote_limits=remote_limits, trailing=trailing
        )


def _transcript(greeting: bytes, listener_id: PeerId, core: bytes) -> bytes:
    """What both proofs and the signature cover: all that was said, and to whom."""
    return greeting + listener_id.digest + core


def _check_magic(received: bytes | bytearray, who: str) -> None:
    """Raise as soon as the first bytes are not those of the protocol."""
    start = bytes(received[: len(MAGIC)])
    if start != MAGIC[: len(start)]:
        raise VersionMismatchError(f"{who} does not speak the protocol of Petals: check address and port")


def _checked_nonce(nonce: bytes) -> bytes:
    assert len(nonce) == NONCE_BYTES, "a nonce has 32 bytes"
    return nonce


def _pack_limits(limits: WireLimits) -> bytes:
    values = [getattr(limits, name) for name in _LIMIT_RANGES]
    for (name, (low, high)), value in zip(_LIMIT_RANGES.items(), values, strict=True):
        if not low <= value <= high:
            raise ConfigurationError(f"the limit {name} is {value}: give one from {low} to {high}")
    return _LIMITS.pack(*values)


def _unpack_limits(content: bytes) -> WireLimits:
    values = dict(zip(_LIMIT_RANGES, _LIMITS.unpack(content), strict=True))
    for name, (low, high) in _LIMIT_RANGES.items():
        if not low <= values[name] <= high:
            raise ProtocolError(f"the peer's limit {name} is {values[name]}, which is not within {low} to {high}")
    return WireLimits(**values)
