"""Node ids, the contacts that nodes tell each other about, and the two kinds of keys in the directory."""

from __future__ import annotations

import functools
import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field

from petals_core.identity import PeerId

ID_BYTES = 20
_PORT_BYTES = 2
_PACKED_4 = ID_BYTES + 4 + _PORT_BYTES
_PACKED_6 = ID_BYTES + 16 + _PORT_BYTES
MODELS_KEY = hashlib.sha256(b"petals models 1\0").digest()[:ID_BYTES]
"""Where the list of models is kept."""


def model_key(fingerprint: str, prefix: str = "") -> bytes:
    """Where the announcements of a model are kept; with a prefix, those of peers whose ids begin with these digits."""
    below = b"\0" + prefix.encode() if prefix else b""
    return hashlib.sha256(b"petals model 1\0" + fingerprint.encode() + below).digest()[:ID_BYTES]


def node_id(peer_id: PeerId) -> bytes:
    """A peer's place in the id space of Kademlia: the first 160 bits of its peer id."""
    return peer_id.digest[:ID_BYTES]


@dataclass(frozen=True, slots=True)
class Contact:
    """A node's id and where it receives datagrams; ``host`` is an IP address in its shortest text form."""

    id: bytes
    host: str
    port: int
    long_id: int = field(init=False, repr=False, compare=False)
    """The id as a number, as the routing table of the ``kademlia`` package wants it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "long_id", int.from_bytes(self.id, "big"))

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port


def distance(left: bytes, right: bytes) -> int:
    """Kademlia's XOR metric (Maymounkov and Mazieres 2002, section 2.1)."""
    return int.from_bytes(left, "big") ^ int.from_bytes(right, "big")


@functools.lru_cache(maxsize=8192)
def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse an IP address. Remembered, since everything that goes in or out names hosts."""
    return ipaddress.ip_address(host)


@functools.lru_cache(maxsize=8192)
def _unpacked_host(packed: bytes) -> str:
    return normalised_host(str(ipaddress.ip_address(packed)))


@functools.lru_cache(maxsize=8192)
def normalised_host(host: str) -> str:
    """The one text form of an IP address: v4-mapped IPv6 becomes IPv4, scope ids go.

    Raises:
        ValueError: ``host`` is no IP address.
    """
    ip = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return str(ip)


@functools.lru_cache(maxsize=8192)
def source_group(host: str) -> str:
    """Whom a host's use is charged to: an IPv4 address, or the /64 network of an IPv6 address."""
    ip = _ip(host)
    return host if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def may_be_told(contact: Contact, *, by: str) -> bool:
    """Whether a contact that the host ``by`` told us about may be contacted.

    Nobody else's word makes us send to this very machine, to a wildcard or to a group of hosts.
    """
    return contact.port != 0 and _is_host_told(contact.host, by)


@functools.lru_cache(maxsize=8192)
def _is_host_told(host: str, by: str) -> bool:
    ip = _ip(host)
    if ip.is_unspecified or ip.is_multicast or ip.is_link_local:
        return False
    return not ip.is_loopback or _ip(by).is_loopback


def pack_contacts(contacts: Iterable[Contact]) -> tuple[bytes, bytes]:
    """The compact forms (compare BEP 5 and BEP 32): 26 bytes for each IPv4 contact, 38 for each IPv6 contact."""
    packed_4, packed_6 = bytearray(), bytearray()
    for contact in contacts:
        ip = _ip(contact.host)
        packed = packed_4 if ip.version == 4 else packed_6
        packed += contact.id + ip.packed + contact.port.to_bytes(_PORT_BYTES, "big")
    return bytes(packed_4), bytes(packed_6)


def unpack_contacts(packed_4: bytes, packed_6: bytes) -> list[Contact]:
    """Read what ``pack_contacts`` made; a remainder that is no whole contact is left out."""
    contacts = []
    for packed, size in ((packed_4, _PACKED_4), (packed_6, _PACKED_6)):
        for start in range(0, len(packed) - size + 1, size):
            entry = packed[start : start + size]
            host = _unpacked_host(entry[ID_BYTES:-_PORT_BYTES])
            contacts.append(Contact(entry[:ID_BYTES], host, int.from_bytes(entry[-_PORT_BYTES:], "big")))
    return contacts
