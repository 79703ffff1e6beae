"""The bounds on everything that a peer may send, in one place."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """Bounds of one connection. The receiver's values bind the sender: they are told in the hello."""

    max_frame_bytes: int = 64 * KIB
    """Largest payload of one frame. Small, so that a decode step overtakes a prefill between two frames."""
    max_message_bytes: int = 256 * MIB
    """Largest message: envelope and tensors together."""
    max_envelope_bytes: int = 64 * KIB
    max_streams: int = 256
    """Streams that a peer may have open at once on one connection."""
    stream_credit_bytes: int = 4 * MIB
    """A message may begin on a stream while less than this waits there for the application (``wire.credit``)."""
    connection_credit_bytes: int = 64 * MIB
    """The same for all streams together: once for decode steps, and once for everything else."""
    handshake_timeout_s: float = 10.0
    ping_interval_s: float = 10.0
    """Silence after which a ping is sent."""
    idle_timeout_s: float = 30.0
    """Silence after which the connection counts as dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerLimits:
    """Bounds of one listening server."""

    max_connections: int = 1024
    max_connections_per_peer: int = 16
    max_handshakes: int = 64
    """Connections that may be in the handshake at once."""
    max_handshakes_per_source: int = 32
    """The same, from one IPv4 address or one /64 network of IPv6."""


MAX_DATAGRAM_BYTES = 1232
"""IPv6's minimum MTU of 1,280 bytes less the IPv6 and UDP headers (RFC 8200 section 5): never fragmented."""
MAX_ANNOUNCEMENT_BYTES = 960
MAX_ANNOUNCEMENT_LIFETIME_S = 1800.0
MAX_CLOCK_SKEW_S = 60.0
MAX_BLOCKS = 1024
MAX_HOPS = 64
"""Servers of one chain that pass states to each other."""
MAX_NAME_CHARS = 128
MAX_ADDRESSES = 4
MAX_ADAPTERS = 8
MAX_ADAPTER_RANK = 256
MAX_ADAPTER_LAYERS = 64
"""Linear layers of a block that a tuning session may change."""
MAX_MODULE_PATH_CHARS = 128
MAX_NEXT_DELAYS = 8
MAX_OBSERVED = 4
MAX_RECEIPT_BYTES = 512
MAX_RECEIPTS_SHOWN = 64
MAX_DEADLINE_S = 3600
"""How long a peer may say that it waits for one answer."""
MAX_BATCH_ROWS = 1024
MAX_STEP_TOKENS = 1 << 20
MAX_JOINED_TOKENS = 512
MAX_SESSION_TOKENS = 1 << 22
