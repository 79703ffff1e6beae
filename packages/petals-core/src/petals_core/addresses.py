"""Where a peer listens: a host name or IP address, and a port that TCP and UDP share."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Self

from petals_core.errors import ConfigurationError

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
_MAX_HOST_CHARS = 253
_SOURCE_PREFIX_BITS = 64
"""One IPv6 host has a whole /64 to its name; limits per source count that as one."""


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A host (name, IPv4 or IPv6 without brackets) and a port from 1 to 65535.

    Raises:
        ConfigurationError: the host or the port can't exist.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not isinstance(self.port, int) or not 0 < self.port < 65536:
            raise ConfigurationError(f"port {self.port} is not between 1 and 65535")
        if self.ip is None and (len(self.host) > _MAX_HOST_CHARS or not _HOST_NAME.fullmatch(self.host)):
            raise ConfigurationError(f"{self.host!r} is neither a host name nor an IP address")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``HOST:PORT`` or ``[IPV6]:PORT``.

        Raises:
            ConfigurationError: ``text`` has another form.
        """
        host, separator, port = text.strip().rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ConfigurationError(f"{text!r} is not an address: write an IPv6 address as [ADDRESS]:PORT")
        if not separator or not host or not port.isascii() or not port.isdecimal():
            raise ConfigurationError(f"{text!r} is not an address: expected HOST:PORT, for example 203.0.113.5:31330")
        return cls(host, int(port))

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The host as an IP address, or None for a name. An IPv4 address that is written as an IPv6 one is IPv4."""
        try:
            found = ipaddress.ip_address(self.host)
        except ValueError:
            return None
        return getattr(found, "ipv4_mapped", None) or found

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address (names: RFC 6761 section 6.3)."""
        if self.ip is not None:
            return self.ip.is_loopback
        return self.host.lower().rstrip(".").rpartition(".")[2] == "localhost"

    @property
    def is_unspecified(self) -> bool:
        """Whether the host is a wildcard such as 0.0.0.0, that nobody can connect to."""
        return self.ip is not None and self.ip.is_unspecified

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def source_of(host: str) -> str:
    """What counts as one source of connections: an IPv4 address or the network of an IPv6 address."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host
    if ip.version == 4:
        return host
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((int(ip), _SOURCE_PREFIX_BITS), strict=False))
