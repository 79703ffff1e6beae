"""A client's end: connects to peers by address and identity, and keeps one connection to each."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from collections.abc import Sequence

from petals_core.addresses import Address
from petals_core.errors import AuthenticationError, PeerConnectionError, PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.limits import WireLimits
from petals_core.net.congestion import send_bursts_at_once
from petals_core.net.connection import PeerConnection
from petals_core.net.link import Link
from petals_core.net.race import race
from petals_core.net.tasks import BackgroundTasks
from petals_core.net.tls import dialer_context
from petals_core.swarm_key import SwarmKey
from petals_core.wire.compression import Mode
from petals_core.wire.hello import NONCE_BYTES, DialerHello, HelloResult
from petals_core.wire.throttle import Throttle

__all__ = ["Dialer", "PeerConnection"]

_HEAD_START_S = 0.25
"""How long an address is tried alone before the next one joins in (RFC 8305 section 5)."""


class Dialer:
    """Connections to peers, at most one to each, made when they are first wanted and again after a loss.

    It belongs to the event loop that first calls ``connect``. The other end learns ``identity``; it opens no streams.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        swarm_key: SwarmKey | None = None,
        limits: WireLimits | None = None,
        connect_timeout_s: float = 5.0,
        compression: Mode = "none",
        throttle: Throttle | None = None,
    ) -> None:
        """``compression`` is of tensors that are sent; ``throttle`` limits what all connections send."""
        self._throttle = throttle
        self.connect_timeout_s = connect_timeout_s
        """For looking up names, connecting and authenticating together."""
        self._compression: Mode = compression
        self._identity = identity
        self._swarm_key = swarm_key
        self._limits = dataclasses.replace(limits or WireLimits(), max_streams=0)
        self._context = dialer_context()
        self._tasks = BackgroundTasks()
        self._attempts: dict[PeerId | tuple[Address, ...], asyncio.Task[PeerConnection]] = {}
        self._connections: dict[PeerId, PeerConnection] = {}
        self._links: set[Link] = set()
        self._is_closed = False

    @property
    def peer_id(self) -> PeerId:
        """The identity that other ends see."""
        return self._identity.peer_id

    async def connect(
        self, addresses: Sequence[Address], *, peer_id: PeerId | None, is_public: bool = False
    ) -> PeerConnection:
        """Return the open connection to a peer, or make one; callers that come together share one attempt.

        Addresses are tried in order, the next one a quarter of a second after the last. ``peer_id`` None takes whoever
        answers (``PeerConnection.peer_id`` says who), for first contacts of which only the address is known. With
        ``is_public`` no host name is followed into a private network or this machine. When the
        caller is cancelled the attempt goes on for the others, for ``connect_timeout_s`` at most.

        Raises:
            PeerConnectionError: no address answers in time, or the dialer is closed.
            AuthenticationError: another peer answers, or the swarm keys differ.
            VersionMismatchError: the other end speaks no version of the protocol that we speak.
            ProtocolError: the other end speaks something else.
            OverloadedError, DrainingError: the peer takes no more connections.
        """
        if self._is_closed:
            raise PeerConnectionError("the dialer is closed")
        found = self._find(addresses, peer_id)
        if found is not None:
            return found
        key = peer_id or tuple(addresses)
        attempt = self._attempts.get(key)
        if attempt is None:
            attempt = self._attempts[key] = self._tasks.start(self._connect(tuple(addresses), peer_id, is_public))
            attempt.add_done_callback(lambda _: self._attempts.pop(key, None))
        try:
            return await asyncio.shield(attempt)
        except asyncio.CancelledError:
            if attempt.cancelled() and self._is_closed:
                raise PeerConnectionError("the dialer was closed") from None
            raise

    def find(self, peer_id: PeerId) -> PeerConnection | None:
        """The open connection to a peer; None: there is none."""
        return self._connections.get(peer_id)

    def drop(self, connection: PeerConnection) -> None:
        """Close one of its connections at once; never blocks. The next ``connect`` makes another one."""
        self._forget(connection)
        self._tasks.start(connection.close(PeerConnectionError("it fell silent")))

    def drop_idle(self, max_connections: int) -> None:
        """Close connections on which no stream is open while there are more than so many, the oldest first."""
        idle = [each for each in self._connections.values() if not each.num_streams]
        for connection in idle[: max(0, len(self._connections) - max_connections)]:
            self._forget(connection)
            self._tasks.start(connection.close())

    async def close(self) -> None:
        """Close all connections and end all attempts. Afterwards no task, timer or socket is left. Idempotent."""
        self._is_closed = True
        await self._tasks.close()
        await asyncio.gather(*(connection.close() for connection in list(self._connections.values())))
        await asyncio.gather(*(link.close() for link in list(self._links)))

    def _find(self, addresses: Sequence[Address], peer_id: PeerId | None) -> PeerConnection | None:
        if peer_id is not None:
            return self.find(peer_id)
        return next((each for each in self._connections.values() if each.address in addresses), None)

    async def _connect(self, addresses: tuple[Address, ...], peer_id: PeerId | None, is_public: bool) -> PeerConnection:
        deadline = asyncio.get_running_loop().time() + self.connect_timeout_s
        connection = await race(
            addresses,
            lambda address: self._reach(address, peer_id, deadline, is_public),
            head_start_s=_HEAD_START_S,
            discard=self._discard,
        )
        known = self._connections.get(connection.peer_id)
        if known is not None:
            self._discard(connection)
            return known
        if not connection.is_closed:
            self._connections[connection.peer_id] = connection
        return connection

    async def _reach(
        self, address: Address, peer_id: PeerId | None, deadline: float, is_public: bool
    ) -> PeerConnection:
        """Connect to one address, by whichever of its IP addresses answers first."""
        if address.ip is not None:
            return await self._dial(address, address.host, peer_id, deadline)
        hosts = await self._look_up(address, deadline)
        if is_public:
            hosts = [host for host in hosts if (ip := Address(host, address.port).ip) is not None and ip.is_global]
            if not hosts:
                raise PeerConnectionError(f"the name {address.host} stands for no address that all the world can reach")
        return await race(
            hosts,
            lambda host: self._dial(address, host, peer_id, deadline),
            head_start_s=_HEAD_START_S,
            discard=self._discard,
        )

    async def _look_up(self, address: Address, deadline: float) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except TimeoutError:
            raise PeerConnectionError(f"the name {address.host} could not be looked up in time") from None
        except OSError as error:
            raise PeerConnectionError(f"the name {address.host} is not known: {_text(error)}") from error
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def _dial(self, address: Address, host: str, peer_id: PeerId | None, deadline: float) -> PeerConnection:
        """Connect to one IP address and authenticate; on any failure the socket is closed."""
        loop = asyncio.get_running_loop()
        link = Link(self._context, self._links, is_listener=False, throttle=self._throttle)
        try:
            async with asyncio.timeout_at(deadline):
                sock = await _connect(host, address.port)
                await loop.create_connection(lambda: link, sock=sock)
                hello, rtt_s = await self._authenticate(link, peer_id)
            return PeerConnection(
                link,
                hello,
                is_dialer=True,
                address=address,
                limits=self._limits,
                rtt_s=rtt_s,
                compression=self._compression,
                on_closed=self._forget,
            )
        except BaseException as error:
            was_reached = link in self._links
            link.abort()
            if isinstance(error, TimeoutError):
                what = "accepted the connection but does not answer as a Petals peer" if was_reached else "no answer"
                raise PeerConnectionError(f"{address}: {what} (within {self.connect_timeout_s:g} s)") from error
            if isinstance(error, PetalsError):
                raise type(error)(f"{address}: {error.message}", retry_after_s=error.retry_after_s) from error
            if isinstance(error, OSError):
                raise PeerConnectionError(f"{address}: {_text(error)}") from error
            raise

    async def _authenticate(self, link: Link, peer_id: PeerId | None) -> tuple[HelloResult, float]:
        """Go through TLS and hello; return the hello's result and the round trip in seconds."""
        await link.secured()
        listener_id = PeerId.of_public_key(link.tls.peer_public_key())
        if peer_id is not None and listener_id != peer_id:
            raise AuthenticationError(f"peer {listener_id.short} answers there, expected {peer_id.short}")
        hello = DialerHello(
            identity=self._identity,
            listener_id=listener_id,
            nonce=os.urandom(NONCE_BYTES),
            swarm_key=self._swarm_key,
            limits=self._limits,
        )
        answered_at_s = time.monotonic()
        while hello.result is None:
            hello.receive_data(await link.read())
            if answer := hello.data_to_send():
                answered_at_s = time.monotonic()
                link.write([answer])
        return hello.result, time.monotonic() - answered_at_s

    def _forget(self, connection: PeerConnection) -> None:
        if self._connections.get(connection.peer_id) is connection:
            del self._connections[connection.peer_id]

    def _discard(self, connection: PeerConnection) -> None:
        self._tasks.start(connection.close())


def _text(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nothing listens there"
    return (error.strerror or str(error)).lower()


async def _connect(host: str, port: int) -> socket.socket:
    """A connected socket to an IP address; on any failure it is closed."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        send_bursts_at_once(sock)
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
    except BaseException:
        sock.close()
        raise
    return sock
