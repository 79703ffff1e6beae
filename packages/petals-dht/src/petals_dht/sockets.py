"""UDP sockets and host names.

One rule for the two families of addresses: a node bound to ``::`` is dual-stack and speaks to both, a node bound to any
other address speaks to its own family and ignores contacts of the other. IPv4 addresses that a dual-stack socket maps
into IPv6 are IPv4 addresses everywhere else.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Sequence

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError

_RECEIVE_BUFFER_BYTES = 1 << 20


def bind_udp(host: str | None, port: int) -> socket.socket:
    """Return a UDP socket on ``host``; None means every address of this machine, of both families where it has both.

    Raises:
        ConfigurationError: the host is none of this machine's, or the port is in use.
    """
    if host is None:
        try:
            return bind_udp("::", port)
        except ConfigurationError:
            return bind_udp("0.0.0.0", port)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error:
        raise explain_bind_error(error, host, port) from error
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address[0] == "::" else 1)
        # Bursts come in when many nodes answer at once; the system gives what it allows.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        sock.bind(address)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise explain_bind_error(error, host, port) from error
    return sock


def explain_bind_error(error: OSError, host: str, port: int) -> ConfigurationError:
    """What to tell a user who asked to listen there."""
    if isinstance(error, socket.gaierror):
        return ConfigurationError(f"can't listen on {host}: the name is not known; give an address of this machine")
    if error.errno == errno.EADDRINUSE:
        return ConfigurationError(f"port {port} is in use: choose another with --port, or 0 for a free one")
    if error.errno == errno.EACCES:
        return ConfigurationError(f"port {port} needs privileges: choose one over 1023 with --port")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigurationError(
            f"can't listen on {host}: it is no address of this machine; give one of its own, or 0.0.0.0 for all, and "
            "with --announce-host the one by which others reach it"
        )
    return ConfigurationError(f"can't listen on {host} port {port}: {error.strerror or error}")


def families_of(sock: socket.socket) -> frozenset[int]:
    """The IP versions (4, 6) that a bound socket can speak to."""
    if sock.family == socket.AF_INET:
        return frozenset({4})
    is_dual = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
    return frozenset({4, 6}) if is_dual else frozenset({6})


async def resolve(address: Address, families: frozenset[int]) -> Sequence[tuple[str, int]]:
    """The (IP, port) pairs that an address stands for, of those families only; empty if its name is not known."""
    if address.ip is not None:
        found = [str(address.ip)]
    else:
        loop = asyncio.get_running_loop()
        try:
            infos = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError):
            return ()
        found = list(dict.fromkeys(str(info[4][0]) for info in infos))
    return tuple(
        (host, address.port) for host in found if ipaddress.ip_address(host.partition("%")[0]).version in families
    )
