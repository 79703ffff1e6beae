"""A session with one server of a chain: what goes out on its stream, and who gets what comes in."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import DeadlineExceededError, PetalsError, ProtocolError
from petals_core.limits import MIB
from petals_core.net.dialer import PeerConnection
from petals_core.net.rpc import call
from petals_core.net.stream import EndOfStreamError, Stream
from petals_core.routing.graph import Hop
from petals_core.steps import StepRequest
from petals_core.tensors.states import States as States
from petals_core.tensors.states import read_states as read_states
from petals_core.wire.events import MessageReceived
from petals_core.wire.frames import Priority
from petals_core.wire.messages import (
    SESSION_ID_BYTES,
    Body,
    Buffer,
    Failure,
    Message,
    NewAttempt,
    OpenSession,
    Progress,
    ProgressRequest,
    Replay,
    Replayed,
    Route,
    Routed,
    SessionOpened,
    Step,
)

BACKLOG_BYTES = 4 * MIB
"""Of steps that wait for the network before the sender does."""
PARTS_BACKLOG_BYTES = MIB // 2
"""The same for a step in parts: those that still wait here when a server is lost are in the way of what comes next."""
B = TypeVar("B", bound=Body)
OnMessage = Callable[["HopSession", MessageReceived], None]
OnFailure = Callable[["HopSession", PetalsError], None]


class HopSession:
    """A session on one server, open until it is closed or ``error`` says what broke it."""

    def __init__(self, hop: Hop, server: SignedAnnouncement, connection: PeerConnection, stream: Stream) -> None:
        self.hop = hop
        self.server = server
        self.connection = connection
        self.session_id = b""
        self.error: PetalsError | None = None
        """Why it is of no use any more."""
        self.is_empty = True
        """Its cache is not what the other servers' caches are: nothing was computed there yet, or not all of it."""
        self.is_cut_off = False
        """It can't reach the next server, so that the client carries the states between them."""
        self.can_replay = True
        """What it has kept may rebuild others; not where that did not bring them to where they should be."""
        self.handed_on = -1
        """Number of the last step that it gave to the client to carry, in the attempt under way."""
        self.num_refusals = 0
        """Times that it was too busy for the step under way."""
        self.stays_until_s = 0.0
        """Before this time nobody is looked for to take the place of this server, though it should be left."""
        self._stream = stream
        self._attempt = 0
        """The last one that the server was told of."""
        self._route: Route | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._on_message: OnMessage
        self._on_failure: OnFailure

    @classmethod
    async def open(
        cls,
        hop: Hop,
        server: SignedAnnouncement,
        connection: PeerConnection,
        request: OpenSession,
        payload: Sequence[Buffer],
        *,
        timeout_s: float,
    ) -> HopSession:
        """Open a stream and the session on it; on failure nothing is left.

        Raises:
            PetalsError: the server refused, or did not answer in time.
        """
        stream = connection.open_stream(Priority.DECODE)
        try:
            async with asyncio.timeout(timeout_s):
                await stream.send(request, payload)
                reply = await stream.receive(timeout_s=None)
            if not isinstance(reply.body, SessionOpened):
                raise ProtocolError(f"the server answered with {type(reply.body).__name__} to the opening of a session")
        except TimeoutError:
            stream.cancel()
            raise DeadlineExceededError(f"it did not open a session within {timeout_s:g} s") from None
        except BaseException:
            stream.cancel()
            raise
        session = cls(hop, server, connection, stream)
        session.session_id = request.session_id
        return session

    @staticmethod
    def new_id() -> bytes:
        """A random name of a session on one server."""
        return os.urandom(SESSION_ID_BYTES)

    def start(self, on_message: OnMessage, on_failure: OnFailure) -> None:
        """Hand what comes to its user, who is to :meth:`accept` it; a ``PetalsError`` of his breaks the session.

        ``on_failure`` is called for each step that fails, with ``error.attempt`` set, and once when the session breaks.
        """
        self._on_message, self._on_failure = on_message, on_failure
        self._stream.hand_on(self._receive)
        self._watcher = asyncio.create_task(self._watch())

    def accept(self, event: MessageReceived) -> Message:
        """What has come, whose credit goes back to the server with it."""
        return self._stream.accept(event)

    async def send(self, step: Step, payload: Sequence[Buffer], *, backlog_bytes: int = BACKLOG_BYTES) -> None:
        """Send a step; waits while more than ``backlog_bytes`` wait for the network. The payload must never change.

        Raises:
            PetalsError: the session is broken.
        """
        self._stream.priority = Priority.of_step(sum(step.row_tokens))
        await self._stream.send(step, payload, backlog_bytes=backlog_bytes)

    def send_now(self, step: Step, payload: Sequence[Buffer]) -> bool:
        """``send`` a small step without a task, if nothing waits for the network; else False, and nothing was done."""
        self._stream.priority = Priority.of_step(sum(step.row_tokens))
        return self._stream.send_now(step, payload)

    async def route(
        self,
        *,
        attempt: int,
        previous: HopSession | None,
        following: HopSession | None,
        is_last: bool,
        timeout_s: float,
    ) -> None:
        """Tell the server of the attempt, and its place in the chain, if it has another one.

        Raises:
            NextHopError: it can't reach the next one.
            PetalsError: the session is broken.
        """
        route = Route(
            session_id=self.session_id,
            attempt=0,
            deadline_ms=max(1, int(1000 * timeout_s)),
            is_last=is_last,
            previous=None if previous is None else previous.hop.peer_id.digest,
            next=None if following is None else following.server.encoded,
            next_session=None if following is None else following.session_id,
        )
        told = self._route
        if told is not None and (told.is_last, told.previous, told.next_session) == (
            route.is_last,
            route.previous,
            route.next_session,
        ):
            if attempt != self._attempt:
                # On the session's own stream: a server that is about to stop takes no others.
                self._attempt = attempt
                await self._stream.send(NewAttempt(attempt=attempt), backlog_bytes=BACKLOG_BYTES)
            return
        self._route = None
        await self._ask(dataclasses.replace(route, attempt=attempt), Routed, timeout_s)
        self._route, self._attempt = route, attempt

    async def replay(self, *, attempt: int, before: int, passes: int, max_tokens: int, timeout_s: float) -> int | None:
        """Let the server send its kept outputs to the next; returns the number of the last step of these.

        Raises:
            OutputsGoneError: it has not kept them.
            PetalsError: the session is broken.
        """
        request = Replay(
            session_id=self.session_id,
            attempt=attempt,
            before=before,
            passes=passes,
            max_tokens=max_tokens,
            deadline_ms=max(1, int(1000 * timeout_s)),
        )
        return (await self._ask(request, Replayed, timeout_s)).last

    async def progress(self, *, timeout_s: float) -> Progress:
        """Ask how far the session is.

        Raises:
            PetalsError: the session is broken, or nobody answers.
        """
        return await self._ask(ProgressRequest(session_id=self.session_id), Progress, timeout_s)

    def close(self) -> None:
        """Tell the server that the session is over; never blocks, idempotent."""
        if self._watcher is not None:
            self._watcher.cancel()
        self._stream.cancel()

    async def _ask(self, request: Body, reply: type[B], timeout_s: float) -> B:
        message = await call(self.connection, request, reply=reply, priority=Priority.DECODE, timeout_s=timeout_s)
        assert isinstance(message.body, reply)
        return message.body

    def _receive(self, event: MessageReceived) -> None:
        if self.error is not None:
            with contextlib.suppress(PetalsError):
                self.accept(event)
            return
        try:
            if isinstance(event.message.body, Failure):
                self.accept(event)
            self._on_message(self, event)
        except PetalsError as error:
            if error.attempt is not None:
                self._on_failure(self, error)
            else:
                self._break(error)

    async def _watch(self) -> None:
        """Wait for the end of the stream, which is the session's."""
        try:
            await self._stream.receive(timeout_s=None)
        except EndOfStreamError:
            self._break(ProtocolError("it ended the session by itself"))
        except PetalsError as error:
            self._break(error)

    def _break(self, error: PetalsError) -> None:
        if self.error is None:
            self.error = error
            self._on_failure(self, error)


def is_of_request(step: Step, request: StepRequest) -> bool:
    """Whether a step that a server passes on asks for what it was sent to ask for.

    Of how many tokens may be joined a server need not know.
    """
    asked = StepRequest(
        keep=step.keep,
        row_tokens=step.row_tokens,
        row_order=step.row_order,
        position_runs=step.position_runs,
        wanted=step.wanted,
        join_tokens=request.join_tokens,
    )
    return asked == request


def make_step(
    number: int, request: StepRequest, states: States, attempt: int, timeout_s: float, passes: int | None = None
) -> Step:
    """The message of a step to the first server of a chain."""
    return Step(
        step=number,
        keep=request.keep,
        row_tokens=request.row_tokens,
        row_order=request.row_order,
        position_runs=request.position_runs,
        tensors=(states.spec.to_wire(),),
        deadline_ms=max(1, int(timeout_s * 1000)),
        attempt=attempt,
        passes=passes,
        wanted=request.wanted,
        join_tokens=request.join_tokens,
    )
