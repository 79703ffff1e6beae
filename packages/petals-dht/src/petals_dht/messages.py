"""What nodes say to each other: requests and responses as values, each small enough for one datagram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from petals_core import schema
from petals_core.limits import MAX_ANNOUNCEMENT_BYTES, MAX_DATAGRAM_BYTES
from petals_core.schema import ruled
from petals_dht.contacts import ID_BYTES

TOKEN_BYTES = 8
SLOT_BYTES = 32
DIGEST_BYTES = 8
PAGE_BYTES = 1000
"""Entries in one response. Behind contacts, fewer fit."""
_KIND_KEY = "kind"
_key = schema.binary(ID_BYTES, ID_BYTES)
_token = schema.binary(TOKEN_BYTES, TOKEN_BYTES)
_slot = schema.binary(SLOT_BYTES, SLOT_BYTES)
_packed = schema.binary(0, MAX_DATAGRAM_BYTES)
_host = schema.text(45)
_port = schema.integer(0, 65535)
_reason = schema.text(200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Are you there? The only request that needs not name the node that it is meant for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """I am, and your datagram came from there."""

    host: str = ruled(_host)
    port: int = ruled(_port)
    token: bytes = ruled(_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class FindNode:
    """Which nodes do you know that are nearest to ``key``?"""

    key: bytes = ruled(_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nearest nodes that are known, in compact form, and what a later request needs to show."""

    token: bytes = ruled(_token)
    contacts_4: bytes = ruled(_packed, default=b"")
    contacts_6: bytes = ruled(_packed, default=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Find:
    """What is kept under ``key`` in the slots behind ``after``, up to ``until``?"""

    key: bytes = ruled(_key)
    after: bytes | None = ruled(schema.optional(_slot), default=None)
    """None asks for the first page, with the nearest nodes in it."""
    until: bytes | None = ruled(schema.optional(_slot), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One page of what is kept under a key, in the order of the slots."""

    token: bytes = ruled(_token)
    entries: tuple[bytes, ...] = ruled(schema.sequence(schema.binary(1, MAX_ANNOUNCEMENT_BYTES), 64))
    total: int = ruled(schema.integer(0, 1 << 20))
    """Entries under the key, on all pages."""
    digest: bytes = ruled(schema.binary(DIGEST_BYTES, DIGEST_BYTES))
    """Of the entries that were asked for, where these are at most 64; else of all. Where it is that of what others
    gave, nothing needs be read here."""
    next: bytes | None = ruled(schema.optional(_slot), default=None)
    """Where the next page starts; None: this was the last one."""
    contacts_4: bytes = ruled(_packed, default=b"")
    contacts_6: bytes = ruled(_packed, default=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Keep an announcement under a key. ``token`` is of an earlier response to the same address (compare BEP 5)."""

    key: bytes = ruled(_key)
    token: bytes = ruled(_token)
    entry: bytes = ruled(schema.binary(1, MAX_ANNOUNCEMENT_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Whether the announcement, or a later one of its slot, is kept now; else why not."""

    is_kept: bool = ruled(schema.boolean)
    reason: str = ruled(_reason, default="")
    later: bytes | None = ruled(schema.optional(schema.binary(1, MAX_ANNOUNCEMENT_BYTES)), default=None)
    """The announcement that is kept instead because it was issued later."""
    total: int = ruled(schema.integer(0, 1 << 20), default=0)
    """Entries under the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReachable:
    """Connect to the address that this datagram comes from, at that TCP port: is it the peer with that id?"""

    token: bytes = ruled(_token)
    port: int = ruled(schema.integer(1, 65535))
    peer_id: bytes = ruled(schema.binary(32, 32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """Outcome of ``CheckReachable``; ``is_reachable`` is None if it was not tried."""

    host: str = ruled(_host)
    is_reachable: bool | None = ruled(schema.optional(schema.boolean), default=None)
    reason: str = ruled(_reason, default="")


Request: TypeAlias = Ping | FindNode | Find | Store | CheckReachable
Response: TypeAlias = Pong | Nodes | Found | Stored | Reached
_REQUESTS: dict[str, type[Request]] = {
    "ping": Ping,
    "find_node": FindNode,
    "find_value": Find,
    "store": Store,
    "check": CheckReachable,
}
_RESPONSES: dict[str, type[Response]] = {
    "ping": Pong,
    "find_node": Nodes,
    "find_value": Found,
    "store": Stored,
    "check": Reached,
}
_NAMES: dict[type[Any], str] = {kind: name for table in (_REQUESTS, _RESPONSES) for name, kind in table.items()}


def encode(message: Request | Response) -> bytes:
    """The body of a datagram."""
    content = schema.to_map(message)
    content[_KIND_KEY] = _NAMES[type(message)]
    return schema.pack(content)


def decode_request(body: bytes) -> Request:
    """Read a request from an untrusted peer.

    Raises:
        SchemaError: it is not a known, well-formed request.
    """
    return _decode(body, _REQUESTS)


def decode_response(body: bytes) -> Response:
    """Read a response from an untrusted peer.

    Raises:
        SchemaError: it is not a known, well-formed response.
    """
    return _decode(body, _RESPONSES)


def _decode(body: bytes, kinds: dict[str, type[Any]]) -> Any:
    content = schema.unpack(body)
    name = content.get(_KIND_KEY) if type(content) is dict else None
    kind = kinds.get(name) if type(name) is str else None
    if kind is None:
        raise schema.SchemaError("unknown kind of message")
    return schema.from_map(kind, content)
