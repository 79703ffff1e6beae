"""A server's end: accepts connections, authenticates peers, and runs a handler for every stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Self

from petals_core.addresses import Address, source_of
from petals_core.errors import (
    ConfigurationError,
    DrainingError,
    OverloadedError,
    PetalsError,
    RemoteFailureError,
)
from petals_core.identity import Identity, PeerId
from petals_core.limits import ListenerLimits, WireLimits
from petals_core.net.congestion import send_bursts_at_once
from petals_core.net.connection import PeerConnection
from petals_core.net.link import Link
from petals_core.net.stream import EndOfStreamError, Stream
from petals_core.net.tasks import BackgroundTasks
from petals_core.net.tls import listener_context
from petals_core.swarm_key import SwarmKey
from petals_core.wire.compression import Mode
from petals_core.wire.hello import NONCE_BYTES, ListenerHello
from petals_core.wire.throttle import Throttle

Handler = Callable[[Stream], Awaitable[None]]

_logger = logging.getLogger(__name__)
_BACKLOG = 256
_RETRY_AFTER_S = 5.0


class Listener:
    """Listens on a TCP port and calls ``handler(stream)`` as a task for each stream that a peer opens.

    A handler reads requests and sends replies until it returns; then the stream ends. An error that it raises is told
    to the peer: a ``PetalsError`` as it is, anything else as ``RemoteFailureError`` without details, with the traceback
    in the log. The handler is cancelled when its peer vanishes or gives up the stream.
    """

    def __init__(
        self,
        identity: Identity,
        handler: Handler,
        *,
        swarm_key: SwarmKey | None = None,
        limits: WireLimits | None = None,
        listener_limits: ListenerLimits | None = None,
        compression: Mode = "none",
        throttle: Throttle | None = None,
    ) -> None:
        """Prepare; ``start`` is what opens the port. ``compression`` is of tensors that are sent; ``throttle`` limits
        what is sent, of all connections together."""
        self._throttle = throttle
        self._compression: Mode = compression
        self._identity = identity
        self._handler = handler
        self._swarm_key = swarm_key
        self._limits = limits or WireLimits()
        self._listener_limits = listener_limits or ListenerLimits()
        self._context = listener_context(identity)
        self._server: asyncio.Server | None = None
        self._links: set[Link] = set()
        self._connections: set[PeerConnection] = set()
        self._handshakes: Counter[str] = Counter()
        self._greeters = BackgroundTasks()
        self._handlers = BackgroundTasks()
        self._is_draining = False
        self.port = 0
        """The port that is listened on."""

    @classmethod
    async def start(
        cls,
        *,
        identity: Identity,
        handler: Handler,
        swarm_key: SwarmKey | None = None,
        host: str = "::",
        port: int = 0,
        sock: socket.socket | None = None,
        limits: WireLimits | None = None,
        listener_limits: ListenerLimits | None = None,
        compression: Mode = "none",
        throttle: Throttle | None = None,
    ) -> Self:
        """Listen on ``host`` and ``port`` (0: any free one), or on a bound TCP socket that is given.

        ``0.0.0.0`` takes IPv4 alone, ``::`` takes IPv6 and, where the system allows, IPv4 too; a name stands for the
        first address that it resolves to.

        Raises:
            ConfigurationError: the host is no address of this machine, or the port can't be used.
        """
        listener = cls(
            identity,
            handler,
            swarm_key=swarm_key,
            limits=limits,
            listener_limits=listener_limits,
            compression=compression,
            throttle=throttle,
        )
        if sock is None:
            sock = await _bind(host, port)
        send_bursts_at_once(sock)
        listener.port = sock.getsockname()[1]
        loop = asyncio.get_running_loop()
        listener._server = await loop.create_server(listener._accept, sock=sock, backlog=_BACKLOG)
        return listener

    @property
    def peer_id(self) -> PeerId:
        """The identity that peers see."""
        return self._identity.peer_id

    @property
    def num_connections(self) -> int:
        """Connections of authenticated peers."""
        return len(self._connections)

    @property
    def num_streams(self) -> int:
        """Streams whose handler runs."""
        return len(self._handlers)

    async def drain(self) -> None:
        """Take no new streams and no new connections: peers are told with ``DrainingError``. Open streams go on."""
        self._is_draining = True
        for connection in self._connections:
            connection.drain()

    async def close(self, grace_s: float = 0.0) -> None:
        """Stop listening, drain, give open streams ``grace_s`` to end, then close everything. Idempotent.

        Afterwards no task, timer or socket of the listener is left.
        """
        if self._server is not None:
            self._server.close()
        await self.drain()
        if grace_s > 0:
            await self._handlers.join(grace_s)
        await self._handlers.close()
        await self._greeters.close()
        reason = DrainingError("the server has stopped")
        await asyncio.gather(*(connection.close(reason) for connection in list(self._connections)))
        await asyncio.gather(*(link.close() for link in list(self._links)))
        if self._server is not None:
            await self._server.wait_closed()

    # --- connections

    def _accept(self) -> Link:
        return Link(self._context, self._links, is_listener=True, on_made=self._admit, throttle=self._throttle)

    def _admit(self, link: Link) -> None:
        """A TCP connection has been made."""
        limits = self._listener_limits
        source = source_of(link.remote[0])
        if not source:
            link.abort()  # gone before we looked
        elif self._handshakes.total() >= limits.max_handshakes:
            _logger.debug("dropped a connection from %s: too many handshakes", source)
            link.abort()
        elif self._handshakes[source] >= limits.max_handshakes_per_source:
            _logger.debug("dropped a connection from %s: too many handshakes of this source", source)
            link.abort()
        else:
            self._handshakes[source] += 1
            self._greeters.start(self._greet(link, source), name=f"petals greet {source}")

    async def _greet(self, link: Link, source: str) -> None:
        try:
            async with asyncio.timeout(self._limits.handshake_timeout_s):
                await self._authenticate(link)
        except TimeoutError:
            _logger.debug("dropped a connection from %s: the handshake took too long", source)
            link.abort()
        except PetalsError as error:
            _logger.debug("refused a connection from %s: %s", source, error)
            link.finish()
        except BaseException:
            link.abort()
            raise
        finally:
            self._handshakes -= Counter((source,))  # which forgets sources that have none left

    async def _authenticate(self, link: Link) -> None:
        await link.secured()
        hello = ListenerHello(
            identity=self._identity, nonce=os.urandom(NONCE_BYTES), swarm_key=self._swarm_key, limits=self._limits
        )
        greeted_at_s = time.monotonic()
        link.write([hello.data_to_send()])
        while hello.result is None:
            try:
                hello.receive_data(await link.read())
            except PetalsError:
                if refusal := hello.data_to_send():
                    link.write([refusal])
                raise
        result = hello.result
        refused = self._refusal(result.peer_id)
        if refused is not None:
            hello.refuse(refused)
            link.write([hello.data_to_send()])
            raise refused
        link.write([hello.data_to_send()])
        connection = PeerConnection(
            link,
            result,
            is_dialer=False,
            address=Address(*link.remote),
            limits=self._limits,
            rtt_s=time.monotonic() - greeted_at_s,
            compression=self._compression,
            on_stream=self._serve,
            on_closed=self._connections.discard,
        )
        if not connection.is_closed:
            self._connections.add(connection)

    def _refusal(self, peer_id: PeerId) -> PetalsError | None:
        limits = self._listener_limits
        if self._is_draining:
            return DrainingError("the server is about to stop")
        if len(self._connections) >= limits.max_connections:
            return OverloadedError("the server has too many connections", retry_after_s=_RETRY_AFTER_S)
        if sum(each.peer_id == peer_id for each in self._connections) >= limits.max_connections_per_peer:
            return OverloadedError("this peer has too many connections to the server", retry_after_s=_RETRY_AFTER_S)
        return None

    # --- streams

    def _serve(self, stream: Stream) -> None:
        stream.own(self._handlers.start(self._handle(stream), name=f"petals stream of {stream.peer_id.short}"))

    async def _handle(self, stream: Stream) -> None:
        try:
            with contextlib.suppress(EndOfStreamError):
                await self._handler(stream)
        except PetalsError as error:
            stream.cancel(error)
        except asyncio.CancelledError:
            stream.cancel(DrainingError("the server is about to stop"))
            raise
        except Exception:
            _logger.exception("the handler of a stream of peer %s failed", stream.peer_id)
            stream.cancel(RemoteFailureError("internal error of the server"))
        else:
            await stream.finish()
            # A peer that still sends is told that nobody listens; one that has ended has nothing left to hear.
            stream.cancel()


async def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise ConfigurationError(f"can't listen on port {port}: it is not between 0 and 65535")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, place = found[0]
        is_dual = place[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(place[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=is_dual)
    except OSError as error:
        raise ConfigurationError(
            f"can't listen on {host} port {port}: {(error.strerror or str(error)).lower()}"
        ) from error
