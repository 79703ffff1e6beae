"""What a server tells the swarm about itself: signed, expiring, small enough for one datagram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from petals_core import schema
from petals_core.addresses import Address
from petals_core.errors import ConfigurationError, InvalidAnnouncementError
from petals_core.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId, verify
from petals_core.limits import (
    MAX_ADAPTERS,
    MAX_ADDRESSES,
    MAX_ANNOUNCEMENT_BYTES,
    MAX_ANNOUNCEMENT_LIFETIME_S,
    MAX_BLOCKS,
    MAX_CLOCK_SKEW_S,
    MAX_NAME_CHARS,
    MAX_NEXT_DELAYS,
    MAX_OBSERVED,
)
from petals_core.next_delays import NextDelays
from petals_core.schema import ruled

DTYPES = ("float64", "float32", "float16", "bfloat16")
QUANTIZATIONS = ("none", "int8", "nf4", "fp4", "fp8", "mxfp4", "gptq", "awq", "other")
"""Forms of a server's weights. Servers make the first three; checkpoints that are stored quantized have all."""
STATES = ("joining", "online", "draining", "offline")
OBSERVED_ID_BYTES = 8
_SIGNATURE_CONTEXT = b"petals announcement 1\0"
_MAX_RATE = 1e12
_LATEST_TIME_S = 1e11


def _address(value: object) -> Address:
    """Rule for an address in its text form."""
    try:
        return Address.parse(schema.text(300)(value))
    except ConfigurationError as error:
        raise schema.SchemaError(error.message) from None


_next_delay_pairs = schema.sequence(schema.pair(schema.binary(32, 32), schema.number(0, 60)), MAX_NEXT_DELAYS)


def _next_delays(value: object) -> NextDelays:
    """Rule for delays to others, a list of pairs."""
    return NextDelays.of(_next_delay_pairs(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """One server's span of one model, as the server states it. Speeds and loads are claims, not facts."""

    model_name: str = ruled(schema.text(MAX_NAME_CHARS))
    fingerprint: str = ruled(schema.text(64))
    num_blocks: int = ruled(schema.integer(1, MAX_BLOCKS))
    """Blocks of the whole model."""
    start: int = ruled(schema.integer(0, MAX_BLOCKS))
    """First block of the span."""
    end: int = ruled(schema.integer(0, MAX_BLOCKS))
    """One past the last block of the span."""
    addresses: tuple[Address, ...] = ruled(schema.sequence(_address, MAX_ADDRESSES))
    state: str = ruled(schema.choice(*STATES))
    torch_dtype: str = ruled(schema.choice(*DTYPES))
    issued_at_s: float = ruled(schema.number(0, _LATEST_TIME_S))
    """Unix time of signing; of two announcements by a peer for a model the later one counts."""
    expires_at_s: float = ruled(schema.number(0, _LATEST_TIME_S))
    quantization: str = ruled(schema.choice(*QUANTIZATIONS), default="none")
    adapters: tuple[str, ...] = ruled(schema.sequence(schema.text(MAX_NAME_CHARS), MAX_ADAPTERS), default=())
    inference_tokens_per_s: float | None = ruled(schema.optional(schema.number(0, _MAX_RATE)), default=None)
    forward_tokens_per_s: float | None = ruled(schema.optional(schema.number(0, _MAX_RATE)), default=None)
    cache_tokens_left: int | None = ruled(schema.optional(schema.integer(0, 1 << 40)), default=None)
    load: float | None = ruled(schema.optional(schema.number(0, 1e6)), default=None)
    """Work waiting over work that a turn takes; 0 is idle."""
    version: str = ruled(schema.text(32), default="")
    public_name: str = ruled(schema.text(MAX_NAME_CHARS), default="")
    next_delays: NextDelays = ruled(_next_delays, default_factory=NextDelays)
    """To servers that are likely to come next in a chain."""
    intent: tuple[int, int] | None = ruled(
        schema.optional(schema.pair(schema.integer(0, MAX_BLOCKS), schema.integer(0, MAX_BLOCKS))), default=None
    )
    """Blocks that the server is about to hold instead: first, and one past the last."""
    intent_at_s: float | None = ruled(schema.optional(schema.number(0, _LATEST_TIME_S)), default=None)
    """Unix time at which it began to want them."""
    observed: tuple[tuple[bytes, int], ...] = ruled(
        schema.sequence(
            schema.pair(schema.binary(OBSERVED_ID_BYTES, OBSERVED_ID_BYTES), schema.integer(0, 100)), MAX_OBSERVED
        ),
        default=(),
    )
    """Of other servers, named by the beginning of their id: percent of the announced speed that was reached."""

    def __post_init__(self) -> None:
        if self.intent is not None and not 0 <= self.intent[0] < self.intent[1] <= self.num_blocks:
            raise ValueError(f"blocks {self.intent[0]}:{self.intent[1]} are not within 0:{self.num_blocks}")
        if not 0 <= self.start < self.end <= self.num_blocks:
            raise ValueError(f"blocks {self.start}:{self.end} are not within 0:{self.num_blocks}")
        if not self.issued_at_s < self.expires_at_s <= self.issued_at_s + MAX_ANNOUNCEMENT_LIFETIME_S:
            raise ValueError(f"lifetime is not within 0 to {MAX_ANNOUNCEMENT_LIFETIME_S:.0f} s")


@dataclass(frozen=True, slots=True)
class SignedAnnouncement:
    """An announcement with the key that signed it; only ``sign`` and ``decode`` make one, so it is always authentic."""

    announcement: Announcement
    public_key: bytes
    encoded: bytes
    """The wire form: a msgpack array of public key, signature and content."""

    @property
    def peer_id(self) -> PeerId:
        """The peer that signed."""
        return PeerId.of_public_key(self.public_key)

    @classmethod
    def sign(cls, announcement: Announcement, identity: Identity) -> Self:
        """Sign with a server's identity.

        Raises:
            InvalidAnnouncementError: the content is too large for one datagram.
        """
        fields = schema.to_map(announcement)
        fields["addresses"] = [str(address) for address in announcement.addresses]
        fields["next_delays"] = list(announcement.next_delays)
        content = schema.pack(fields)
        signature = identity.sign(_SIGNATURE_CONTEXT + content)
        encoded = schema.pack([identity.public_key, signature, content])
        if len(encoded) > MAX_ANNOUNCEMENT_BYTES:
            raise InvalidAnnouncementError(
                f"the announcement takes {len(encoded)} bytes of at most {MAX_ANNOUNCEMENT_BYTES}: "
                "use a shorter --public-name or fewer adapters"
            )
        return cls(announcement, identity.public_key, encoded)

    @classmethod
    def decode(cls, encoded: bytes, *, now_s: float | None) -> Self:
        """Read and verify an announcement from an untrusted peer.

        ``now_s`` is Unix time; None: it may be of any time, as where only the way to the server matters.

        Raises:
            InvalidAnnouncementError: it is malformed, oversized, forged, expired, or from the future.
        """
        if len(encoded) > MAX_ANNOUNCEMENT_BYTES:
            raise InvalidAnnouncementError(f"announcement of {len(encoded)} bytes is over {MAX_ANNOUNCEMENT_BYTES}")
        try:
            public_key, signature, content = schema.sequence(schema.binary(1, MAX_ANNOUNCEMENT_BYTES), 3, 3)(
                schema.unpack(encoded)
            )
            if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
                raise schema.SchemaError("public key or signature has a wrong length")
            announcement = schema.from_map(Announcement, schema.unpack(content))
        except schema.SchemaError as error:
            raise InvalidAnnouncementError(f"malformed announcement: {error}") from None
        if now_s is not None and announcement.expires_at_s <= now_s:
            raise InvalidAnnouncementError("the announcement has expired, or a clock is wrong")
        if now_s is not None and announcement.issued_at_s > now_s + MAX_CLOCK_SKEW_S:
            raise InvalidAnnouncementError("the announcement is from the future: a clock is wrong")
        if not verify(public_key, signature, _SIGNATURE_CONTEXT + content):
            raise InvalidAnnouncementError("the announcement's signature is not by its key")
        return cls(announcement, public_key, bytes(encoded))
