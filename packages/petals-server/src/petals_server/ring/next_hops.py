"""The servers that sessions pass their outputs on to: who may be one, and connections to them."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import DrainingError, NextHopError, PetalsError, ProtocolError, WrongModelError
from petals_core.net.dialer import Dialer, PeerConnection
from petals_core.net.stream import Stream
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Push, Pushed
from petals_dht.rates import Rate, RateLimiter

log = logging.getLogger(__name__)

_MAX_CONNECTIONS: Final = 128
"""More stay open only while sessions use them."""
_FAILURES: Final = Rate(per_s=0.5, burst=32.0)


class NextHops:
    """Ways to the next servers of all sessions of a server."""

    def __init__(self, dialer: Dialer, *, fingerprint: str, is_local: bool) -> None:
        """``is_local``: whether the next server may be one of a private network, or of this machine.

        A server that all the world can reach does not connect to such addresses for a stranger.
        """
        self.dialer = dialer
        self._fingerprint = fingerprint
        self._is_local = is_local
        self._failures = RateLimiter(_FAILURES)
        """Those that could not be reached, by whoever named them."""

    def check(self, encoded: bytes) -> SignedAnnouncement:
        """Read the announcement of a next server.

        Raises:
            InvalidAnnouncementError, WrongModelError: it is none of this model, or only for another machine.
        """
        # Of any time: a session outlives announcements, and the connection proves who answers.
        server = SignedAnnouncement.decode(encoded, now_s=None)
        if server.announcement.fingerprint != self._fingerprint:
            raise WrongModelError("the next server holds another checkpoint")
        ips = [address.ip for address in server.announcement.addresses]
        if not self._is_local and any(ip is not None and not ip.is_global for ip in ips):
            raise NextHopError("the next server is in a private network")
        return server

    async def reach(
        self, server: SignedAnnouncement, session_id: bytes, *, timeout_s: float, source: str
    ) -> tuple[PeerConnection, Stream]:
        """Connect to a next server and open a stream that takes steps there, for a client from ``source``.

        Who can't be reached is told without a reason, and sources that name many such servers have to wait: nobody is
        to find out through this server what listens where.

        Raises:
            NextHopError: it can't be reached, or takes no steps from here, or there were too many of that.
        """
        if not self._failures.admit(source, now_s=time.monotonic()):
            raise NextHopError("too many next servers can't be reached: try again in a minute")
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self.dialer.connect(
                    server.announcement.addresses, peer_id=server.peer_id, is_public=not self._is_local
                )
                stream = await _open_outlet(connection, session_id)
        except (PetalsError, TimeoutError) as error:
            log.debug("the next server %s can't be reached: %s", server.peer_id.short, error or "no answer in time")
            raise NextHopError("the next server can't be reached") from None
        self._failures.admit(source, now_s=time.monotonic(), cost=-1.0)  # only failures count
        self.dialer.drop_idle(_MAX_CONNECTIONS)
        return connection, stream


async def _open_outlet(connection: PeerConnection, session_id: bytes) -> Stream:
    """A stream to the next server that takes steps; on failure none is left."""
    if connection.is_draining:
        raise DrainingError("it is about to stop")
    stream = connection.open_stream(Priority.DECODE)
    try:
        await stream.send(Push(session_id=session_id))
        reply = await stream.receive(timeout_s=None)
        if not isinstance(reply.body, Pushed):
            raise ProtocolError(f"it answered with {type(reply.body).__name__} to pushed steps")
    except BaseException:
        stream.cancel()
        raise
    return stream
