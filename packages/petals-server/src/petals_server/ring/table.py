"""The open sessions of a server by their ids, and who may ask for which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from petals_core.errors import InvalidRequestError
from petals_core.net.stream import Stream
from petals_core.wire.messages import ProgressRequest, Push, Replay, Replayed, Route, Routed
from petals_server.config import ServerLimits
from petals_server.ring.arrivals import no_session
from petals_server.ring.kept_outputs import KeptOutputs
from petals_server.ring.next_hops import NextHops
from petals_server.ring.session import RingSession

RingRequest = Route | Replay | ProgressRequest | Push
RING_REQUESTS: Final = (Route, Replay, ProgressRequest, Push)


class RingTable:
    """Opens sessions, and answers what is asked about them."""

    def __init__(self, next_hops: NextHops, *, limits: ServerLimits) -> None:
        self.next_hops = next_hops
        self.outputs = KeptOutputs(limits.max_kept_bytes)
        self._route_timeout_s = limits.route_timeout_s
        self._sessions: dict[bytes, RingSession] = {}

    @contextlib.contextmanager
    def opened(self, session_id: bytes, stream: Stream, *, has_cache: bool = True) -> Iterator[RingSession]:
        """A new session of the client's ``stream``, known by its id while this lasts.

        Raises:
            InvalidRequestError: there is one of that id.
        """
        if session_id in self._sessions:
            raise InvalidRequestError("there is a session of that id: take a random one")
        session = self._sessions[session_id] = RingSession(
            stream,
            next_hops=self.next_hops,
            outputs=self.outputs,
            has_cache=has_cache,
            route_timeout_s=self._route_timeout_s,
        )
        try:
            yield session
        finally:
            del self._sessions[session_id]
            session.forget()

    async def serve(self, stream: Stream, request: RingRequest) -> None:
        """Answer a request about a session, or take the steps that another server pushes into one.

        Raises:
            NoSessionError: there is no such session, or not for this peer.
            PetalsError: see ``RingSession``.
        """
        session = self._sessions.get(request.session_id)
        if session is None or (not isinstance(request, Push) and session.client != stream.peer_id):
            raise no_session()
        if isinstance(request, Push):
            await session.follow(stream)
        elif isinstance(request, Route):
            await session.route(request)
            await stream.send(Routed(), end=True)
        elif isinstance(request, Replay):
            await stream.send(Replayed(last=await session.replay(request)), end=True)
        else:
            await stream.send(session.progress(), end=True)
