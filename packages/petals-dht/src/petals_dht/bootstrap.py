"""A node that does nothing but let others join."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence

from petals_core.addresses import Address
from petals_core.identity import Identity
from petals_core.swarm_key import SwarmKey
from petals_dht.directory import Directory
from petals_dht.reachability import dial_back
from petals_dht.signals import stop_signals


async def run_bootstrap(
    identity: Identity,
    host: str | None,
    port: int,
    *,
    announce_host: str | None,
    swarm_key: SwarmKey | None,
    initial_peers: Sequence[Address],
    on_ready: Callable[[Address], None],
) -> None:
    """Run a node until the process is interrupted or told to end; ``on_ready`` gets the address to join by.

    Raises:
        ConfigurationError: the port is in use or the host is not this machine's.
        NoPeersError: there are initial peers and none of them answers.
    """
    with stop_signals() as stopped:
        directory = await Directory.start(
            identity,
            host,
            port,
            swarm_key=swarm_key,
            initial_peers=initial_peers,
            reach=dial_back(identity, swarm_key),
        )
        async with directory:
            join_host = announce_host or _listening_host(host) or directory.observed_host() or _outward_host()
            on_ready(Address(join_host, directory.port))
            await stopped.wait()


def _listening_host(host: str | None) -> str | None:
    return None if host in (None, "", "0.0.0.0", "::") else host


def _outward_host() -> str:
    """The address by which this machine reaches others. Nothing is sent: connecting a UDP socket only picks a route."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # A documentation address (RFC 5737).
        return str(probe.getsockname()[0])
    return "127.0.0.1"
