"""Where a server meets the others: its ports, its node of the directory, and the address that others reach it by."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError
from petals_core.identity import Identity
from petals_core.limits import WireLimits
from petals_core.net.listener import Listener
from petals_core.net.stream import Stream
from petals_core.wire.throttle import Throttle
from petals_dht.directory import Directory
from petals_dht.reachability import dial_back
from petals_server import reachability
from petals_server.config import ServerConfig

log = logging.getLogger(__name__)

_PING_INTERVAL_S: Final = 5.0
_SILENCE_S: Final = 15.0
"""A client that is gone without a word holds its cache for no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrance:
    """Open ports, and a directory that was joined."""

    directory: Directory
    listener: Listener
    address: Address
    """Where others reach the server, and join the swarm."""


def choose_host(config: ServerConfig) -> str | None:
    """Where to listen; None is every address of the machine.

    Raises:
        ConfigurationError: what is configured can't work, as far as that can be told without the network.
    """
    host = reachability.choose_listen_host(config.host, config.announce_host, config.initial_peers)
    reachability.choose_announced_host(
        listen_host=host or "::",
        announce_host=config.announce_host,
        observed_host=None,
        own_host="",
        initial_peers=config.initial_peers,
    )
    return host


async def open_entrance(
    config: ServerConfig,
    host: str | None,
    *,
    identity: Identity,
    throttle: Throttle | None,
    handler: Callable[[Stream], Awaitable[None]],
    resources: AsyncExitStack,
) -> Entrance:
    """Open the ports, join the directory, and see that others can connect.

    ``resources`` is given all that has to be closed, in whatever way this ends.

    Raises:
        ConfigurationError: the port is taken, or others can't connect.
        NoPeersError: none of the initial peers answers.
    """
    tcp, udp = reachability.bind_ports(host, config.port)
    port = tcp.getsockname()[1]
    resources.callback(tcp.close)
    resources.callback(udp.close)
    reach = dial_back(identity, config.swarm_key)
    directory = await resources.enter_async_context(
        await Directory.start(
            identity,
            sock=udp,
            swarm_key=config.swarm_key,
            initial_peers=config.initial_peers,
            reach=reach,
        )
    )
    listener = await Listener.start(
        identity=identity,
        handler=handler,
        swarm_key=config.swarm_key,
        sock=tcp,
        limits=WireLimits(ping_interval_s=_PING_INTERVAL_S, idle_timeout_s=_SILENCE_S),
        compression=config.compression,
        throttle=throttle,
    )
    resources.push_async_callback(listener.close)
    address = Address(
        reachability.choose_announced_host(
            listen_host=host,
            announce_host=config.announce_host,
            observed_host=directory.observed_host(),
            own_host=reachability.find_own_host(),
            initial_peers=config.initial_peers,
        ),
        port,
    )
    if config.initial_peers:
        found = await directory.check_reachable(port, identity.peer_id)
        is_reachable, reason = found.is_reachable, found.reason
        if is_reachable and address.host != found.observed_host:
            # Peers connect to where they see us and nowhere else, so the other address is tried from here.
            reason = await reach(address.host, port, identity.peer_id)
            is_reachable = None if reason else True
    else:
        reason = await reach(address.host, port, identity.peer_id)
        is_reachable = not reason
    if is_reachable:
        bound = ", from this machine alone: --host 0.0.0.0 lets others in" if address.is_loopback else ""
        log.info("peer %s listens and can be reached at %s%s", identity.peer_id.short, address, bound)
    elif is_reachable is None or config.announce_host is not None:
        # An address that the user gave may be one that only others can use, as behind many home routers.
        log.warning("whether others can connect to %s could not be seen: %s", address, reason)
    else:
        raise ConfigurationError(
            f"others can't connect to {address} ({reason}): open TCP and UDP port {port} in firewall and "
            "router (choose it with --port), or set --announce-host to the address by which this machine is reached"
        )
    return Entrance(directory=directory, listener=listener, address=address)
