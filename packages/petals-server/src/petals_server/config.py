"""What a server is told at start. Values only: the command line is checked before anything heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError
from petals_core.identity import Identity
from petals_core.limits import MAX_BLOCKS, MAX_NAME_CHARS
from petals_core.swarm_key import SwarmKey
from petals_core.wire.compression import MODES, Mode
from petals_server.comfort.schedule import Schedule

DEFAULT_PORT = 31330
TORCH_DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPILE_MODES = ("auto", "on", "off")
QUANTIZATIONS = ("none", "int8", "nf4", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds on what clients may take from one server."""

    max_sessions: int = 1024
    max_sessions_per_peer: int = 64
    max_waiting_sessions: int = 1024
    """Sessions that wait for room to begin; further ones are refused at once."""
    max_idle_s: float = 600.0
    """Silence after which a session is closed."""
    max_forward_tokens: int = 32_768
    """Tokens of one forward request without a session."""
    max_queued_tokens: int = 262_144
    """Tokens of all requests that wait for the device; further requests are refused until some are done."""
    max_turn_tokens: int | None = None
    """Tokens, pads included, that the device computes in one go before decode steps get their turn; None: by device."""
    max_graph_bytes: int = 1 << 30
    """Memory for what backward passes need of forwards, of all clients together; a backward of one chunk may take as
    much for itself."""
    max_graph_s: float = 120.0
    """How long a graph waits for its backward."""
    max_tuning_session_bytes: int = 64 << 20
    """Memory of the matrices that one tuning session holds."""
    max_tuning_bytes: int = 256 << 20
    """The same for all clients together."""
    max_tuning_sessions_per_peer: int = 4
    max_kept_bytes: int = 512 << 20
    """Memory for outputs of all sessions, kept so that a server that replaces the next one can be rebuilt."""
    route_timeout_s: float = 5.0
    """How long another server that knows a session's id may wait until the client names it as the one before."""
    retry_after_s: float = 2.0
    """What a client that is refused for want of room is told to wait, where nothing better is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementTiming:
    """How a server that chooses its blocks itself goes on choosing."""

    interval_s: float = 15.0
    """Mean time between two looks at the swarm, in swarms of 50 to 250 servers; see ``check_interval_s``."""
    settle_s: float = 6.0
    """How long an intent is announced before it holds; also the longest that announcing may take."""
    drain_s: float = 20.0
    """How long open sessions may go on before a move; then their clients go on with other servers."""
    repair_drain_s: float = 1.0
    """The same before a move that lights a dark block: meanwhile no session can go on anyway."""

    def __post_init__(self) -> None:
        if not 0 < self.interval_s <= 86_400:
            raise ConfigurationError(f"--rebalance-interval {self.interval_s:g} is not between 0 and 86400 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server: its model and span, where it listens, and whom it joins.

    Raises:
        ConfigurationError: values contradict each other.
    """

    model: str
    """A folder, or a name on the hub."""
    initial_peers: tuple[Address, ...] = ()
    """Peers to join; none starts a new swarm."""
    blocks: tuple[int, int] | None = None
    """First block and one past the last; None: chosen by ``num_blocks``."""
    num_blocks: int | None = None
    """How many blocks to serve where the swarm needs them most; None: as many as memory holds."""
    host: str | None = None
    """Where to listen; None: this machine only if all peers are on it, else all its addresses."""
    port: int | None = None
    """TCP and UDP port; 0: a free one; None: 31330, or a free one where that is taken."""
    announce_host: str | None = None
    """The host that others connect to; None: found out."""
    device: str = "auto"
    torch_dtype: str = "auto"
    quantization: str = "none"
    """What to make of the weights while they are loaded; ``auto`` is nf4 on a GPU and none on a CPU."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters for clients to choose from: folders or names on the hub, or ``NAME=`` one of these."""
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    max_disk_bytes: int | None = None
    """What the folder of downloads may take; None: all that is free."""
    trust_remote_code: bool = False
    """Whether code that comes with a checkpoint is run."""
    identity: Identity | None = None
    """None: this user's first one that no running server uses."""
    swarm_key: SwarmKey | None = None
    public_name: str = ""
    cache_tokens: int | None = None
    """Tokens that the attention caches of all sessions may hold together; None: by free memory."""
    compile: str = "auto"
    """Whether decode steps on a GPU are replayed from recorded graphs: one of ``COMPILE_MODES``."""
    num_threads: int | None = None
    """Threads of the device's computing; None: measured."""
    compression: Mode = "auto"
    """Of hidden states and gradients that are sent: ``auto`` where they arrive earlier that way; never lossy."""
    placement: PlacementTiming | None = PlacementTiming()
    """When a server without ``blocks`` considers moving; None: it stays where it started."""
    schedule: Schedule | None = None
    """Hours in which it serves; None: always."""
    pause_when_busy: bool = False
    """Whether it pauses while others use its device."""
    prefer_contributors: bool = False
    """Whether clients whose servers have computed for others get a higher share."""
    receipts: Path | None = None
    """Where receipts are kept; None: in memory alone."""
    max_upload_bytes_per_s: float | None = None
    """What all connections together may send; None: anything."""
    announce_interval_s: float = 40.0
    announce_lifetime_s: float = 120.0
    limits: ServerLimits = ServerLimits()

    def __post_init__(self) -> None:
        if self.blocks is not None:
            if self.num_blocks is not None:
                raise ConfigurationError("--blocks and --num-blocks exclude each other: give one of them")
            start, end = self.blocks
            if not 0 <= start < end <= MAX_BLOCKS:
                raise ConfigurationError(f"blocks {start}:{end} are not a span: give FIRST:END, for example 0:4")
        if self.num_blocks is not None and not 0 < self.num_blocks <= MAX_BLOCKS:
            raise ConfigurationError(f"--num-blocks {self.num_blocks} is not between 1 and {MAX_BLOCKS}")
        if self.port is not None and not 0 <= self.port < 65536:
            raise ConfigurationError(f"--port {self.port} is not between 0 and 65535")
        if self.torch_dtype not in TORCH_DTYPES:
            raise ConfigurationError(f"--torch-dtype {self.torch_dtype} is none of {', '.join(TORCH_DTYPES)}")
        if self.compile not in COMPILE_MODES:
            raise ConfigurationError(f"--compile {self.compile} is none of {', '.join(COMPILE_MODES)}")
        if self.quantization not in QUANTIZATIONS:
            raise ConfigurationError(f"--quantization {self.quantization} is none of {', '.join(QUANTIZATIONS)}")
        if self.compression not in MODES:
            raise ConfigurationError(f"--compression {self.compression} is none of {', '.join(MODES)}")
        for option, host in (("--host", self.host), ("--announce-host", self.announce_host)):
            if host is not None:
                try:
                    Address(host, DEFAULT_PORT)
                except ConfigurationError:
                    raise ConfigurationError(f"{option} {host!r} is neither a host name nor an IP address") from None
        if self.announce_host is not None and Address(self.announce_host, DEFAULT_PORT).is_unspecified:
            raise ConfigurationError(
                f"--announce-host {self.announce_host}: nobody can connect to a wildcard address; "
                "give the name or address by which others reach this machine"
            )
        if len(self.public_name) > MAX_NAME_CHARS or not self.public_name.isprintable():
            raise ConfigurationError(f"--public-name takes at most {MAX_NAME_CHARS} printable characters")
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise ConfigurationError(f"--attn-cache-tokens {self.cache_tokens} is not positive")
        if self.num_threads is not None and not 0 < self.num_threads <= 1024:
            raise ConfigurationError(f"--threads {self.num_threads} is not between 1 and 1024")


def parse_blocks(text: str) -> tuple[int, int]:
    """Read ``FIRST:END``.

    Raises:
        ConfigurationError: ``text`` has another form.
    """
    first, separator, end = text.partition(":")
    if not separator or not all(part.isascii() and part.isdecimal() and len(part) <= 9 for part in (first, end)):
        raise ConfigurationError(f"--blocks {text!r} is not a span: give FIRST:END, for example 0:4")
    return int(first), int(end)


def parse_size(text: str, option: str = "--max-disk-space") -> int:
    """Read a number of bytes that was given as ``option``: ``500MB``, ``1.5 GiB``, ``2TB``.

    Raises:
        ConfigurationError: ``text`` has another form, or is nothing.
    """
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([kmgtKMGT]?)(i?)[bB]?", text.strip())
    if match is None or not (num_bytes := int(float(match[1]) * _size_unit(match[2], is_binary=bool(match[3])))):
        raise ConfigurationError(f"{option} {text!r} is not a size: give for example 200GB")
    return num_bytes


def _size_unit(prefix: str, *, is_binary: bool) -> int:
    return (1024 if is_binary else 1000) ** (" kmgt".index(prefix.lower()) if prefix else 0)


def parse_rate(text: str) -> float:
    """Read a rate of sending in bytes per second: ``20mbit``, ``2.5MB``; both per second.

    Raises:
        ConfigurationError: ``text`` has another form, or is too little to serve with.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*([kmg])(bit|B|b)(?:/s|ps)?", text.strip(), re.IGNORECASE)
    rate = 0.0 if match is None else float(match[1]) * 1000 ** (1 + "kmg".index(match[2].lower()))
    if match is not None and match[3] not in ("B",):
        rate /= 8
    if rate < 10_000:
        raise ConfigurationError(f"--max-upload {text!r} is no rate of 10 kB a second or more: give for example 20mbit")
    return rate
