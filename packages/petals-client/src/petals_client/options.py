"""What a client is told about the swarm, and its time limits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petals_core.addresses import Address
from petals_core.announcement import DTYPES, QUANTIZATIONS, SignedAnnouncement
from petals_core.errors import ConfigurationError
from petals_core.identity import Identity
from petals_core.limits import MAX_DEADLINE_S, MIB
from petals_core.swarm_key import SwarmKey
from petals_core.wire.compression import MODES, Mode

ACTIVATION_CODECS = ("float32", "float16", "bfloat16", "int8")
GRADIENT_ENCODINGS = ("float32", "float16", "bfloat16", "int8")
_MIN_TIMEOUT_S = 0.001
_PEER = re.compile(r"[a-z2-7]{8,52}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """How to reach a swarm. Times are in seconds."""

    initial_peers: tuple[Address, ...]
    swarm_key: SwarmKey | None = None
    identity: Identity | None = None
    """Of this client's owner, that of a server of his for example: the client's own key is derived from it, so it is
    always the same, and what that server computed for others is shown to servers. None: another key each time."""
    receipts: Path | None = None
    """Where the receipts of that server lie; None: where ``petals-server`` of this user keeps them."""
    connect_timeout_s: float = 5.0
    """For finding the initial peers, and for each connection to a server."""
    step_timeout_s: float = 60.0
    """For one step of a session, or one request, through one server, its waiting in a queue included."""
    open_timeout_s: float = 30.0
    """For opening a session, waiting for room in a server's cache included."""
    recovery_timeout_s: float = 120.0
    """For finding others in the place of servers that failed, waiting while nobody holds some blocks included."""
    refresh_s: float = 20.0
    """Age at which what is known of the servers is looked up again."""
    max_tokens_per_request: int = 2048
    """Longer prompts and larger batches travel in parts."""
    part_tokens: int | None = None
    """Tokens of the parts of a long prompt, which follow each other through the servers of a chain; None: so many that
    all servers and links work at once."""
    micro_batch_tokens: int | None = None
    """Tokens of whole rows that travel together in a batch; None: by the batch, the number of servers and the link."""
    max_tokens_in_flight: int = 16_384
    """Tokens of one forward or backward that are under way at once, which bounds the client's memory."""
    gradient_encoding: str | None = None
    """How gradients travel: ``float16``, ``bfloat16`` or ``int8``, which loses precision; None: as they are."""
    activation_codec: str | None = None
    """How hidden states travel to and fro: ``float16``, ``bfloat16`` or ``int8``, which loses precision; None: exactly
    as they are."""
    compression: Mode = "auto"
    """Whether hidden states and gradients that are sent are compressed, which loses nothing: ``auto`` where they arrive
    earlier that way by the measured rate of the link, ``none`` or ``zstd``. With ``auto`` an ``activation_codec`` of
    ``int8`` is not used either on links so fast that it would only cost time."""
    allowed_quantization: tuple[str, ...] | None = None
    """Forms of weights that servers may run (``none``, ``int8``, ``nf4``); None: any, and what is lossy is said."""
    allowed_dtypes: tuple[str, ...] | None = None
    """What servers may compute in (``float32``, ``bfloat16``); None: anything, and what differs is said."""
    allowed_servers: tuple[str, ...] | None = None
    """Peer ids of the only servers to use, or their first characters (8 at least); None: any."""
    blocked_servers: tuple[str, ...] = ()
    """Peer ids of servers never to use, or their first characters."""
    history_bytes: int = 256 * MIB
    """Memory per session for what the first server was sent, from which all others can be rebuilt."""
    max_attempts: int = 4
    """Chains that are tried before a request fails."""

    def __post_init__(self) -> None:
        if self.activation_codec not in (None, *ACTIVATION_CODECS):
            raise ConfigurationError(
                f"activation_codec {self.activation_codec!r} is none of {', '.join(ACTIVATION_CODECS)}"
            )
        if self.compression not in MODES:
            raise ConfigurationError(f"compression {self.compression!r} is none of {', '.join(MODES)}")
        for name, known in (("allowed_quantization", QUANTIZATIONS), ("allowed_dtypes", DTYPES)):
            _check_choice(name, getattr(self, name), known)
        for name in ("allowed_servers", "blocked_servers"):
            _check_peers(name, getattr(self, name))
        if self.gradient_encoding not in (None, *GRADIENT_ENCODINGS):
            raise ConfigurationError(
                f"gradient_encoding {self.gradient_encoding!r} is none of {', '.join(GRADIENT_ENCODINGS)}"
            )
        for name in ("max_tokens_in_flight", "micro_batch_tokens", "part_tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigurationError(f"{name} is {number}: give at least 1")
        for name in ("connect_timeout_s", "step_timeout_s", "open_timeout_s"):
            if not _MIN_TIMEOUT_S <= getattr(self, name) <= MAX_DEADLINE_S:
                raise ConfigurationError(
                    f"{name} {getattr(self, name)} is not between {_MIN_TIMEOUT_S} and {MAX_DEADLINE_S} seconds"
                )

    @classmethod
    def make(
        cls,
        *,
        initial_peers: Sequence[str | Address],
        swarm_key_file: str | os.PathLike[str] | None = None,
        identity: str | os.PathLike[str] | Identity | None = None,
        **settings: Any,
    ) -> ClientOptions:
        """Read addresses from their text form, and the keys from their files.

        Raises:
            ConfigurationError: an address or a file can't be used, or there are no addresses.
        """
        if isinstance(initial_peers, (str, Address)):
            initial_peers = [initial_peers]
        addresses: list[Address] = []
        for peer in initial_peers:
            parts = [peer] if isinstance(peer, Address) else map(Address.parse, peer.replace(",", " ").split())
            addresses.extend(parts)
        if not addresses:
            raise ConfigurationError("no initial peers: give the address HOST:PORT of at least one peer of the swarm")
        return cls(
            initial_peers=tuple(dict.fromkeys(addresses)),
            swarm_key=None if swarm_key_file is None else SwarmKey.read(Path(swarm_key_file)),
            identity=Identity.read(Path(identity)) if isinstance(identity, (str, os.PathLike)) else identity,
            **settings,
        )

    def excludes(self, signed: SignedAnnouncement) -> str | None:
        """Say what of a server is not allowed, ``nf4 weights`` or ``float16`` for example; None if all is."""
        announcement = signed.announcement
        if self.allowed_quantization is not None and announcement.quantization not in self.allowed_quantization:
            return (
                "unquantized weights" if announcement.quantization == "none" else f"{announcement.quantization} weights"
            )
        if self.allowed_dtypes is not None and announcement.torch_dtype not in self.allowed_dtypes:
            return announcement.torch_dtype
        if self.allowed_servers is not None or self.blocked_servers:
            peer = str(signed.peer_id)
            if self.allowed_servers is not None and not peer.startswith(self.allowed_servers):
                return "ids that allowed_servers lacks"
            if peer.startswith(self.blocked_servers):
                return "ids in blocked_servers"
        return None


def _check_peers(name: str, chosen: object) -> None:
    if chosen is None:
        return
    if not isinstance(chosen, tuple) or (name == "allowed_servers" and not chosen):
        raise ConfigurationError(f"{name} {chosen!r} is not a list of peer ids")
    for peer in chosen:
        if not isinstance(peer, str) or not _PEER.fullmatch(peer):
            raise ConfigurationError(
                f"{name} {peer!r} is not a peer id: give its 52 letters and digits, or the first 8 or more of them"
            )


def _check_choice(name: str, chosen: object, known: tuple[str, ...]) -> None:
    if chosen is not None and (not isinstance(chosen, tuple) or not chosen or not set(chosen) <= set(known)):
        raise ConfigurationError(f"{name} {chosen!r} is not a choice of {', '.join(known)}")


def as_choice(value: Any) -> tuple[str, ...]:
    """A user's list of names, of peer ids or of torch's dtypes, or a single one, as options have it."""
    items = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return tuple(str(item).removeprefix("torch.") for item in items)
