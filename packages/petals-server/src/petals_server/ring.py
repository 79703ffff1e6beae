"""Sessions as links of a chain: steps come from the client or the server before, outputs go to the server behind.

A session's steps run one by one in a task of its own, whoever sends them. What comes of them is kept for a while, so
that a server that takes the next one's place can be brought to where that was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from petals_core.errors import (
    CacheLostError,
    DeadlineExceededError,
    InvalidRequestError,
    NextHopError,
    NoSessionError,
    OutputsGoneError,
    OverloadedError,
    PetalsError,
    RemoteFailureError,
)
from petals_core.identity import PeerId
from petals_core.limits import MAX_HOPS, MIB
from petals_core.net.dialer import PeerConnection
from petals_core.net.stream import Stream
from petals_core.steps import StepHistory, StepRequest, merge, straighten, wanted_tokens
from petals_core.tensors.states import States, join_states, select_last, select_rows
from petals_core.wire.events import MessageReceived
from petals_core.wire.frames import Priority
from petals_core.wire.messages import (
    Message,
    NewAttempt,
    Progress,
    ProgressRequest,
    Push,
    Pushed,
    Replay,
    Replayed,
    Route,
    Routed,
    Step,
    StepResult,
)
from petals_server.config import ServerLimits
from petals_server.next_hops import NextHops

log = logging.getLogger(__name__)

_BACKLOG_BYTES: Final = 4 * MIB
"""Outputs of one session that wait for the network before the next step is computed."""

_MAX_REPLAYS: Final = 8
"""Requests to replay that wait in one session for its steps to be done; those that were given up count."""

RingRequest = Route | Replay | ProgressRequest | Push
RING_REQUESTS: Final = (Route, Replay, ProgressRequest, Push)
StepHandler = Callable[["RingSession", Step, Message, float], Awaitable[None]]
"""Computes a step that arrived at a time (``time.monotonic``), and delivers what comes of it."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A message on its way into a session."""

    stream: Stream
    """The client's, or that of the server before."""
    event: MessageReceived
    arrived_s: float


class RingSession:
    """One session: its queue of steps, its place in the chain, and what it has kept. Belongs to one event loop."""

    def __init__(self, table: RingTable, session_id: bytes, stream: Stream, *, keeps_outputs: bool) -> None:
        self.session_id = session_id
        self.applied = -1
        """Number of the last step whose tokens are in the cache."""
        self.kept: StepHistory[States] = StepHistory(table.max_kept_bytes)
        self._table = table
        self._keeps_outputs = keeps_outputs
        self._stream = stream
        """The client's."""
        self._inbox: deque[_Arrival | tuple[Replay, asyncio.Future[int | None]]] = deque()
        """What is to be done, in order. The wire's credit, which goes back when a message's turn comes, bounds it."""
        self._early: list[_Arrival] = []
        """Steps that the server before has sent of an attempt of which the client has not spoken yet."""
        self._waiter: asyncio.Future[None] | None = None
        """Of who does it, while there is nothing to do."""
        self._replays: set[asyncio.Future[int | None]] = set()
        """Requests to replay that were not answered yet."""
        self._num_replays = 0
        """That are in the inbox."""
        self._attempt = 0
        self._failed_attempt = -1
        self._received: int | None = None
        self._computed: int | None = None
        self._active_s = time.monotonic()
        self._is_last = True
        self._previous: PeerId | None = None
        self._inlet: Stream | None = None
        self._outlet: Stream | None = None
        self._next_connection: PeerConnection | None = None
        self._next_session: bytes | None = None
        self._routed = asyncio.Event()
        """Somebody else is the one before."""
        self._routing = asyncio.Lock()

    @property
    def client(self) -> PeerId:
        """Whose session it is."""
        return self._stream.peer_id

    async def run(self, handle: StepHandler, *, max_idle_s: float) -> None:
        """Take and compute steps until the client ends or gives up its stream.

        Raises:
            CacheLostError: nothing has happened for ``max_idle_s``.
            PetalsError: a step failed in a way that leaves nothing to go on with, or the client is gone.
        """
        worker = asyncio.create_task(self._work(handle))
        self._stream.hand_on(functools.partial(self._note_arrival, self._stream))
        try:
            while True:
                left_s = max_idle_s - (time.monotonic() - self._active_s)
                try:
                    await self._stream.receive(timeout_s=max(0.0, left_s))
                except DeadlineExceededError:
                    if self._stream.error is not None:
                        raise  # of a step that was cut short, which ended the session
                    if time.monotonic() - self._active_s < max_idle_s:
                        continue  # the server before has sent something meanwhile
                    raise CacheLostError(
                        f"the session was idle for {max_idle_s:.0f} s and is closed: open a new one"
                    ) from None
        finally:
            worker.cancel()
            await asyncio.wait([worker])
            for stream in (self._inlet, self._outlet):
                if stream is not None:
                    stream.cancel()
            for item in (*self._inbox, *self._early):
                if isinstance(item, _Arrival):
                    _accept(item)

    def forget_replays(self) -> None:
        """Nobody will do what was asked for: the session is over."""
        for future in self._replays:
            if not future.done():
                future.set_exception(_no_session())

    def _note_arrival(self, stream: Stream, event: MessageReceived) -> None:
        """Put what the client or the server before has sent at the end of the queue.

        Attempts are the client's: one that it has not named is none, or it is about to, on another connection.
        """
        self._active_s = time.monotonic()
        arrival = _Arrival(stream, event, self._active_s)
        body = event.message.body
        if isinstance(body, NewAttempt) and stream is self._stream:
            _accept(arrival)
            self._begin_attempt(body.attempt)
            return
        if isinstance(body, Step):
            if body.attempt > self._attempt:
                if stream is not self._stream:
                    self._early.append(arrival)
                    return
                self._begin_attempt(body.attempt)
            if body.attempt == self._attempt:
                self._received = body.step
        self._put(arrival)

    def _put(self, item: _Arrival | tuple[Replay, asyncio.Future[int | None]]) -> None:
        self._inbox.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- computing ----------------------------------------------------------------------------------------------------

    async def _work(self, handle: StepHandler) -> None:
        """Do what the inbox holds, one after another; an error that is nobody's request's ends the session."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                if not self._inbox:
                    self._waiter = loop.create_future()
                    await self._waiter
                item = self._inbox.popleft()
                if isinstance(item, _Arrival):
                    await self._do(handle, item)
                else:
                    self._num_replays -= 1
                    await self._replay(*item)
        except Exception:
            log.exception("a session of peer %s failed", self.client)
            self.end(RemoteFailureError("internal error of the server"))

    async def _do(self, handle: StepHandler, arrival: _Arrival) -> None:
        step = await self._open(arrival)
        if step is None or step.attempt < self._attempt or step.attempt == self._failed_attempt:
            return
        try:
            await handle(self, step, arrival.event.message, arrival.arrived_s)
        except PetalsError as error:
            await self._fail(error, step.attempt)
        self._active_s = time.monotonic()

    async def _open(self, arrival: _Arrival) -> Step | None:
        """The step that has arrived; None if it counts no more, or is something else."""
        stream = arrival.stream
        body = arrival.event.message.body
        _accept(arrival)
        if stream is not self._stream and stream is not self._inlet:
            return None
        if isinstance(body, Step):
            return body
        error = InvalidRequestError(f"a session takes steps, not {type(body).__name__}")
        if stream is self._inlet:
            stream.cancel(error)
            return None
        with contextlib.suppress(PetalsError):  # the client is gone, which ends the session
            await stream.fail(error, end=False)
        return None

    async def _fail(self, error: PetalsError, attempt: int) -> None:
        """Tell the client that a step failed; what follows it in the same attempt makes no sense any more."""
        self._failed_attempt = attempt
        error.attempt = attempt
        with contextlib.suppress(PetalsError):  # the client is gone, which ends the session
            await self._stream.fail(error, end=False)

    def end(self, error: PetalsError) -> None:
        """Give the session up, and tell its client why."""
        self._stream.cancel(error)

    async def deliver(self, step: Step, output: States, *, queue_us: int, compute_us: int, deadline_s: float) -> None:
        """Send a step's output where it belongs, and keep it where it may be needed again.

        Raises:
            PetalsError: the client is gone.
        """
        self.applied = step.step
        if step.attempt == self._attempt:
            self._computed = step.step
        is_to_be_kept = self._keeps_outputs and not self._is_last
        try:
            if step.attempt >= self._attempt:  # else the client has begun anew meanwhile, and sends it again
                await self._send(step, output, queue_us, compute_us, deadline_s)
        finally:
            if is_to_be_kept:
                self._table.keep(self, step, output)

    async def _send(self, step: Step, output: States, queue_us: int, compute_us: int, deadline_s: float) -> None:
        connection = self._next_connection if self._outlet is not None else None
        delay_us = 0 if connection is None else _microseconds(connection.rtt_s / 2)
        hops = (*(step.hops or ()), (queue_us, compute_us, delay_us))[:MAX_HOPS]
        if step.passes == 0 or self._is_last:
            result = None if step.passes is not None or step.wanted == 0 else output
            if result is not None and step.wanted is not None:
                result = select_last(step.row_tokens, result, wanted_tokens(step.row_tokens, step.wanted))
            self._stream.priority = Priority.of_step(sum(step.row_tokens))
            await self._stream.send(
                StepResult(
                    step=step.step,
                    attempt=step.attempt,
                    tensors=() if result is None else (result.spec.to_wire(),),
                    queue_us=queue_us,
                    compute_us=compute_us,
                    hops=hops,
                ),
                () if result is None else result.payload,
                backlog_bytes=_BACKLOG_BYTES,
            )
            return
        await self._pass_on(
            replace(
                step,
                tensors=(output.spec.to_wire(),),
                deadline_ms=max(1, int(1000 * (deadline_s - time.monotonic()))),
                passes=None if step.passes is None else step.passes - 1,
                hops=hops,
            ),
            output,
        )

    async def _pass_on(self, step: Step, states: States) -> None:
        stream = self._outlet or self._stream
        stream.priority = Priority.of_step(sum(step.row_tokens))
        try:
            await stream.send(step, states.payload, backlog_bytes=_BACKLOG_BYTES)
        except PetalsError as error:
            if stream is self._stream:
                raise
            if stream is self._outlet:  # else the client has chosen another way meanwhile, and sends the step again
                self._outlet = None
                log.debug("a next server can't be reached any more: %s", error.message)
                raise NextHopError("the next server can't be reached any more") from None

    # --- rebuilding others --------------------------------------------------------------------------------------------

    async def replay(self, request: Replay) -> int | None:
        """Send kept outputs once more, behind what is under way; returns the number of the last one.

        Raises:
            OutputsGoneError: they were not kept.
            NextHopError: the next server can't be reached.
            NoSessionError: the session has ended meanwhile.
            DeadlineExceededError: its turn did not come in time.
            OverloadedError: too many wait for theirs.
        """
        if self._num_replays >= _MAX_REPLAYS:
            raise OverloadedError("too many replays of this session wait already", retry_after_s=1.0)
        self._num_replays += 1
        self._begin_attempt(request.attempt)
        future: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._replays.add(future)
        self._put((request, future))
        try:
            async with asyncio.timeout(request.deadline_ms / 1000):
                return await future
        except TimeoutError:
            raise DeadlineExceededError("the session's steps before the replay were not done in time") from None
        finally:
            self._replays.discard(future)

    async def _replay(self, request: Replay, future: asyncio.Future[int | None]) -> None:
        """Answer before sending: to send takes as long as the next server takes to compute."""
        if future.done():
            return  # nobody waits for it any more
        try:
            steps = None
            if self.kept.is_complete and request.attempt == self._attempt:
                steps = straighten(self.kept.before(request.before), select_rows)
            if steps is None:
                raise OutputsGoneError("the outputs of this session were not kept: replay what comes before")
            future.set_result(steps[-1][0] if steps else None)
            deadline_s = time.monotonic() + request.deadline_ms / 1000
            for number, each, states in merge(steps, join_states, request.max_tokens):
                if request.attempt < self._attempt:
                    return
                step = Step(
                    step=number,
                    keep=each.keep,
                    row_tokens=each.row_tokens,
                    position_runs=each.position_runs,
                    tensors=(states.spec.to_wire(),),
                    deadline_ms=max(1, int(1000 * (deadline_s - time.monotonic()))),
                    attempt=request.attempt,
                    passes=request.passes,
                )
                await self._pass_on(step, states)
        except PetalsError as error:
            if future.done():
                await self._fail(error, request.attempt)
            else:
                future.set_exception(error)

    def progress(self) -> Progress:
        """How far it is."""
        return Progress(attempt=self._attempt, received=self._received, computed=self._computed)

    # --- its place in the chain ---------------------------------------------------------------------------------------

    async def route(self, request: Route) -> None:
        """Take another place in the chain.

        Raises:
            NextHopError: the next server can't be reached, or does not take steps from here.
        """
        async with self._routing:
            self._begin_attempt(request.attempt)
            self._is_last = request.is_last
            previous = None if request.previous is None else PeerId(request.previous)
            if previous != self._previous:
                self._close_inlet()
                self._previous = previous
                self._routed.set()
                self._routed = asyncio.Event()
            if self._outlet is not None and self._outlet.is_open and self._next_session == request.next_session:
                return
            if self._outlet is not None:
                self._outlet.cancel()
            self._outlet = self._next_connection = None
            self._next_session = request.next_session
            if request.next is None or request.next_session is None:
                return
            next_hops = self._table.next_hops
            server = next_hops.check(request.next)
            self._next_connection, self._outlet = await next_hops.reach(
                server, request.next_session, timeout_s=request.deadline_ms / 1000, source=self._stream.source
            )

    async def follow(self, stream: Stream) -> None:
        """Take steps from the server before, until its stream ends or the client chooses another one."""
        try:
            async with asyncio.timeout(self._table.route_timeout_s):
                while self._previous != stream.peer_id:
                    await self._routed.wait()  # the client has told the server before, and us in a moment
        except TimeoutError:
            raise _no_session() from None
        self._close_inlet()
        self._inlet = stream
        stream.hand_on(functools.partial(self._note_arrival, stream))
        await stream.send(Pushed())
        while True:
            await stream.receive(timeout_s=None)  # its end

    def _close_inlet(self) -> None:
        """What has come through it, and was not begun, counts no more."""
        if self._inlet is not None:
            self._inlet.cancel()
            self._inlet = None
        for arrival in self._early:
            _accept(arrival)
        self._early.clear()

    def _begin_attempt(self, attempt: int) -> None:
        """The client has named an attempt."""
        if attempt > self._attempt:
            self._attempt = attempt
            self._received = self._computed = None
            early, self._early = self._early, []
            for arrival in early:
                self._note_arrival(arrival.stream, arrival.event)


class RingTable:
    """The open sessions of a server by their ids, and the memory that their kept outputs take."""

    def __init__(self, next_hops: NextHops, *, limits: ServerLimits) -> None:
        self.next_hops = next_hops
        self.max_kept_bytes = limits.max_kept_bytes
        self.route_timeout_s = limits.route_timeout_s
        self.kept_bytes = 0
        self._sessions: dict[bytes, RingSession] = {}

    @contextlib.contextmanager
    def opened(self, session_id: bytes, stream: Stream, *, keeps_outputs: bool = True) -> Iterator[RingSession]:
        """A new session, known by its id while this lasts.

        Raises:
            InvalidRequestError: there is one of that id.
        """
        if session_id in self._sessions:
            raise InvalidRequestError("there is a session of that id: take a random one")
        session = self._sessions[session_id] = RingSession(self, session_id, stream, keeps_outputs=keeps_outputs)
        try:
            yield session
        finally:
            del self._sessions[session_id]
            session.forget_replays()
            self.kept_bytes -= session.kept.num_bytes

    async def serve(self, stream: Stream, request: RingRequest) -> None:
        """Answer a request about a session, or take the steps that another server pushes into one.

        Raises:
            NoSessionError: there is no such session, or not for this peer.
            PetalsError: see ``RingSession``.
        """
        session = self._sessions.get(request.session_id)
        if session is None or (not isinstance(request, Push) and session.client != stream.peer_id):
            raise _no_session()
        if isinstance(request, Push):
            await session.follow(stream)
        elif isinstance(request, Route):
            await session.route(request)
            await stream.send(Routed(), end=True)
        elif isinstance(request, Replay):
            await stream.send(Replayed(last=await session.replay(request)), end=True)
        else:
            await stream.send(session.progress(), end=True)

    def keep(self, session: RingSession, step: Step, output: States) -> None:
        """Keep an output within the budget; where there is no room, the session that has kept most keeps nothing."""
        before = session.kept.num_bytes
        request = StepRequest(
            keep=step.keep, row_tokens=step.row_tokens, row_order=step.row_order, position_runs=step.position_runs
        )
        # A copy: the output may be a view of a whole batch's.
        states = States(spec=output.spec, payload=(b"".join(output.payload),))
        session.kept.append(step.step, request, states, output.spec.num_bytes)
        self.kept_bytes += session.kept.num_bytes - before
        while self.kept_bytes > self.max_kept_bytes:
            largest = max(self._sessions.values(), key=lambda each: each.kept.num_bytes)
            self.kept_bytes -= largest.kept.num_bytes
            largest.kept.drop()


def _accept(arrival: _Arrival) -> None:
    """Give back its credit."""
    with contextlib.suppress(PetalsError):  # a ``Failure``, which nobody has to send here
        arrival.stream.accept(arrival.event)


def _no_session() -> NoSessionError:
    return NoSessionError("there is no such session here, or it takes nothing from you")


def _microseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e6))
