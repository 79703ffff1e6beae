"""At which address a server can be reached: its sockets, and the host that it announces."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from typing import Final

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError
from petals_dht.sockets import bind_udp, explain_bind_error
from petals_server.config import DEFAULT_PORT

LOOPBACK: Final = "127.0.0.1"
_LOOPBACK_6: Final = "::1"
_WILDCARDS: Final = ("0.0.0.0", "::")
_NUM_ATTEMPTS: Final = 50
_BACKLOG: Final = 256


def choose_listen_host(host: str | None, announce_host: str | None, initial_peers: Sequence[Address]) -> str | None:
    """Where to listen; None is every address of the machine.

    A swarm whose known peers are all on this machine stays on it unless the user says otherwise.
    """
    if host is not None:
        return host
    if has_peers_elsewhere(initial_peers):
        return None
    if announce_host is not None and not Address(announce_host, DEFAULT_PORT).is_loopback:
        return None
    if initial_peers and all(peer.ip is not None and peer.ip.version == 6 for peer in initial_peers):
        return _LOOPBACK_6
    return LOOPBACK


def has_peers_elsewhere(initial_peers: Sequence[Address]) -> bool:
    """Whether some peer is on another machine, as far as its address tells."""
    return any(not peer.is_loopback for peer in initial_peers)


def choose_announced_host(
    *,
    listen_host: str | None,
    announce_host: str | None,
    observed_host: str | None,
    own_host: str,
    initial_peers: Sequence[Address],
) -> str:
    """The host that others are told to connect to.

    What the user says counts; otherwise the address that is listened on, and where that is all of them, the one that
    the peers see us at, or as a last resort ``own_host``. Peers that see us at a loopback address are on this machine:
    what they see is nothing for the others.

    Raises:
        ConfigurationError: peers on other machines could not connect to it.
    """
    if announce_host is not None:
        host, option = announce_host, "--announce-host"
    elif listen_host is not None and listen_host not in _WILDCARDS:
        host, option = listen_host, "--host"
    elif observed_host is not None and not Address(observed_host, DEFAULT_PORT).is_loopback:
        return observed_host
    else:
        return own_host
    if Address(host, DEFAULT_PORT).is_loopback and has_peers_elsewhere(initial_peers):
        raise ConfigurationError(
            f"{option} {host} is this machine alone, but there are peers elsewhere: "
            "set --announce-host to the address by which they reach this machine"
        )
    return host


def find_own_host() -> str:
    """The address of the network interface that leads to the internet, without sending anything."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))  # Reserved for documentation (RFC 5737); UDP's connect only picks a route.
        return str(sock.getsockname()[0])
    return LOOPBACK


def bind_ports(host: str | None, port: int | None) -> tuple[socket.socket, socket.socket]:
    """A TCP and a UDP socket on the same port number. 0: a free one; None: 31330, or a free one where that is taken.

    Raises:
        ConfigurationError: the port is in use, or the host is none of this machine's.
    """
    if port is None:
        with contextlib.suppress(ConfigurationError):
            return bind_ports(host, DEFAULT_PORT)
        return bind_ports(host, 0)
    for _ in range(_NUM_ATTEMPTS if port == 0 else 1):
        tcp = _bind_tcp(host, port)
        try:
            return tcp, bind_udp(host, tcp.getsockname()[1])
        except ConfigurationError as error:
            tcp.close()
            last_error = error
    raise last_error


def _bind_tcp(host: str | None, port: int) -> socket.socket:
    if host is None:
        try:
            return _bind_tcp("::", port)
        except ConfigurationError:
            return _bind_tcp("0.0.0.0", port)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        is_dual = place[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((place[0], port), family=family, backlog=_BACKLOG, dualstack_ipv6=is_dual)
    except OSError as error:
        raise explain_bind_error(error, host, port) from error
