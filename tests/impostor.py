"""A server that lies: it has a real one compute for it, and says what a test wants instead of what is true.

It speaks the public protocol under an identity of its own. It reaches no other server and lets none push to it, so the
client carries states to it and from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from petals_core.addresses import Address
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import NextHopError, NoSessionError, PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.net.connection import PeerConnection
from petals_core.net.dialer import Dialer
from petals_core.net.listener import Listener
from petals_core.net.rpc import call
from petals_core.net.stream import Stream
from petals_core.next_delays import NextDelays
from petals_core.wire.frames import Priority
from petals_core.wire.messages import (
    Backward,
    BackwardResult,
    Body,
    Contribution,
    Forward,
    ForwardResult,
    Info,
    InfoRequest,
    Message,
    NewAttempt,
    OpenSession,
    Progress,
    ProgressRequest,
    Push,
    Replay,
    Replayed,
    Route,
    Routed,
    SessionOpened,
    Step,
    StepResult,
)
from petals_dht.directory import Directory
from petals_server.server import Server

_TIMEOUT_S = 30.0
Lie = Callable[[Body], PetalsError | None]
"""What it says to a request instead of doing it; None: it does it."""


@dataclass(slots=True)
class _Session:
    stream: Stream
    inner: Stream
    """The session on the real server."""
    is_last: bool = True
    progress: Progress = Progress(attempt=0)  # noqa: RUF009 -- frozen


class Impostor:
    """Belongs to the event loop of its swarm; ``start`` announces it there."""

    def __init__(self, real: Server, lie: Lie) -> None:
        self.lie = lie
        self.num_lies = 0
        self.replayed: Callable[[Impostor, Replay, Any], Awaitable[int | None]] | None = None
        """Answers ``replay?``, and sends what it likes on the session's ``stream``."""
        self.passes_on: Callable[[Step], Step] = lambda step: step
        """What becomes of a step on its way to the next server."""
        self._real = real
        self._identity = Identity.ephemeral()
        self._dialer = Dialer(identity=Identity.ephemeral())
        self._sessions: dict[bytes, _Session] = {}
        self._listener: Listener
        self._directory: Directory
        self._connection: PeerConnection

    @classmethod
    async def start(cls, real: Server, lie: Lie, initial_peers: list[str]) -> Impostor:
        """Serve the blocks of ``real``, and claim to be fast."""
        self = cls(real, lie)
        self._connection = await self._dialer.connect([real.address], peer_id=real.peer_id)
        self._listener = await Listener.start(identity=self._identity, handler=self._serve, host="127.0.0.1")
        self._directory = await Directory.connect(list(map(Address.parse, initial_peers)), identity=self._identity)
        now_s = time.time()
        announcement = replace(
            real._describe(now_s, now_s + 600),
            addresses=(Address("127.0.0.1", self._listener.port),),
            inference_tokens_per_s=1e9,
            forward_tokens_per_s=1e9,
            next_delays=NextDelays(),
        )
        await self._directory.announce(SignedAnnouncement.sign(announcement, self._identity))
        return self

    async def close(self) -> None:
        """Let go of everything."""
        await self._listener.close()
        await self._directory.close()
        await self._dialer.close()

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    def _check(self, body: Body) -> None:
        error = self.lie(body)
        if error is not None:
            self.num_lies += 1
            raise error

    async def _serve(self, stream: Stream) -> None:
        message = await stream.receive(timeout_s=_TIMEOUT_S)
        body = message.body
        self._check(body)
        if isinstance(body, OpenSession):
            await self._serve_session(stream, body, message)
        elif isinstance(body, InfoRequest):
            reply = await call(self._connection, body, reply=Info, timeout_s=_TIMEOUT_S)
            await stream.send(reply.body, end=True)
        elif isinstance(body, (Forward, Backward)):
            kind: Any = ForwardResult if isinstance(body, Forward) else BackwardResult
            reply = await call(self._connection, body, message.payload, reply=kind, timeout_s=_TIMEOUT_S)
            await stream.send(reply.body, reply.payload, end=True)
        elif isinstance(body, Route) and body.session_id in self._sessions:
            self._sessions[body.session_id].is_last = body.is_last
            if body.next is not None:
                raise NextHopError("the next server can't be reached")
            await stream.send(Routed(), end=True)
        elif isinstance(body, ProgressRequest) and body.session_id in self._sessions:
            await stream.send(self._sessions[body.session_id].progress, end=True)
        elif isinstance(body, Replay) and body.session_id in self._sessions and self.replayed is not None:
            self.num_lies += 1
            last = await self.replayed(self, body, self._sessions[body.session_id])
            await stream.send(Replayed(last=last), end=True)
        else:
            assert isinstance(body, (Push, Route, ProgressRequest, Replay, Contribution))
            raise NoSessionError("there is no such session here, or it takes nothing from you")

    async def _serve_session(self, stream: Stream, request: OpenSession, message: Message) -> None:
        inner = self._connection.open_stream(Priority.DECODE)
        try:
            await inner.send(replace(request, session_id=os.urandom(16)), message.payload)
            opened = await inner.receive(timeout_s=_TIMEOUT_S)
            assert isinstance(opened.body, SessionOpened)
            session = self._sessions[request.session_id] = _Session(stream, inner)
            await stream.send(opened.body)
            while True:
                message = await stream.receive(timeout_s=None)
                step = message.body
                if isinstance(step, NewAttempt):
                    continue
                assert isinstance(step, Step)
                session.progress = Progress(attempt=step.attempt or 0, received=step.step)
                try:
                    self._check(step)
                    # The one that computes is the last of its own chain.
                    wanted = step.wanted if session.is_last and step.passes is None else None
                    await inner.send(replace(step, passes=None, wanted=wanted, hops=None), message.payload)
                    result = await inner.receive(timeout_s=_TIMEOUT_S)
                except PetalsError as error:
                    error.attempt = step.attempt
                    await stream.fail(error, end=False)
                else:
                    session.progress = replace(session.progress, computed=step.step)
                    await self._deliver(session, step, result)
        finally:
            self._sessions.pop(request.session_id, None)
            inner.cancel()

    async def _deliver(self, session: _Session, step: Step, result: Message) -> None:
        done = result.body
        assert isinstance(done, StepResult)
        hops = (*(step.hops or ()), (done.queue_us, done.compute_us, 0))
        if step.passes == 0 or session.is_last:
            is_wanted = step.passes is None
            done = replace(done, tensors=done.tensors if is_wanted else (), hops=hops)
            await session.stream.send(done, result.payload if is_wanted else ())
            return
        passes = None if step.passes is None else step.passes - 1
        passed = replace(step, tensors=done.tensors, passes=passes, hops=hops)
        await session.stream.send(self.passes_on(passed), result.payload)
