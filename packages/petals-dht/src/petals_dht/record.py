"""What a bootstrap node writes down: whom it knew, so that it meets them again, and how it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Self

from petals_core import schema
from petals_core.errors import ConfigurationError
from petals_core.identity import PeerId
from petals_core.schema import ruled
from petals_dht.contacts import ID_BYTES, Contact, normalised_host

MAX_CONTACTS = 2000
MAX_RECORD_BYTES = 1 << 20
_MAX_REASONS = 64
_count = schema.integer(0, 1 << 62)
_time_s = schema.number(0, 1e11)


def _peer_id(value: object) -> str:
    """Rule for a peer id in its text form."""
    try:
        return str(PeerId.parse(schema.text(64)(value)))
    except ConfigurationError as error:
        raise schema.SchemaError(error.message) from None


def _contact(value: object) -> Contact:
    """Rule for a contact as [id in hexadecimal, IP address, port]."""
    if not isinstance(value, list) or len(value) != 3:
        raise schema.SchemaError("a contact is not a list of three")
    try:
        id_, host = bytes.fromhex(schema.text(2 * ID_BYTES)(value[0])), normalised_host(schema.text(45)(value[1]))
    except ValueError as error:
        raise schema.SchemaError(str(error)) from None
    if len(id_) != ID_BYTES:
        raise schema.SchemaError(f"a node id has {ID_BYTES} bytes")
    return Contact(id_, host, schema.integer(1, 65535)(value[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A node at one moment. Counts are since its start; times are Unix times."""

    format: int = ruled(schema.integer(1, 1), default=1)
    peer_id: str = ruled(_peer_id)
    address: tuple[str, int] = ruled(schema.pair(schema.text(300), schema.integer(1, 65535)))
    """Where it can be asked from the machine that it runs on."""
    pid: int = ruled(_count)
    started_at_s: float = ruled(_time_s)
    saved_at_s: float = ruled(_time_s)
    contacts: tuple[Contact, ...] = ruled(schema.sequence(_contact, MAX_CONTACTS))
    num_answering: int = ruled(_count)
    """Contacts that answered lately."""
    num_announcements: int = ruled(_count)
    stored_bytes: int = ruled(_count)
    num_requests: int = ruled(_count)
    """Requests that it answered."""
    dropped: tuple[tuple[str, int], ...] = ruled(schema.sequence(schema.pair(schema.text(40), _count), _MAX_REASONS))
    """Datagrams and announcements that it took no further, by reason."""

    def encode(self) -> str:
        """The content of a file."""
        fields = schema.to_map(self)
        fields["contacts"] = [[contact.id.hex(), contact.host, contact.port] for contact in self.contacts]
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def decode(cls, content: bytes) -> Self:
        """Read the content of a file.

        Raises:
            ValueError: it is something else; the text says what is wrong.
        """
        if len(content) > MAX_RECORD_BYTES:
            raise ValueError(f"it has more than {MAX_RECORD_BYTES} bytes")
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError("it is not JSON") from None
        return schema.from_map(cls, fields)

    def to_json(self, *, round_trip_s: float) -> dict[str, Any]:
        """The node's health for programs."""
        return {
            "peer_id": self.peer_id,
            "port": self.address[1],
            "pid": self.pid,
            "started_at_s": self.started_at_s,
            "saved_at_s": self.saved_at_s,
            "round_trip_s": round_trip_s,
            "num_contacts": len(self.contacts),
            "num_answering": self.num_answering,
            "num_announcements": self.num_announcements,
            "stored_bytes": self.stored_bytes,
            "num_requests": self.num_requests,
            "dropped": dict(self.dropped),
        }
