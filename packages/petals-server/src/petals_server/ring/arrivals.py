"""What a session is to do, in order; what its senders have sent counts against their credit until its turn comes.

Attempts are the client's: one that it has not named is none, or it is about to, on another connection. So steps that
the server before has sent of such an attempt wait, within that server's credit.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from petals_core.errors import NoSessionError, OverloadedError, PetalsError
from petals_core.identity import PeerId
from petals_core.net.stream import Stream
from petals_core.wire.events import MessageReceived
from petals_core.wire.messages import NewAttempt, Progress, Pushed, Replay, Step

_MAX_REPLAYS: Final = 8
"""Requests to replay that wait in one session for its steps to be done; those that were given up count."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message on its way into a session."""

    stream: Stream
    """The client's, or that of the server before."""
    event: MessageReceived
    arrived_s: float
    """``time.monotonic`` then."""

    def accept(self) -> None:
        """Give back its credit; once."""
        with contextlib.suppress(PetalsError):  # a ``Failure``, which nobody has to send here
            self.stream.accept(self.event)


@dataclass(frozen=True, slots=True, eq=False)
class WaitingReplay:
    """A request to replay whose turn is to come."""

    request: Replay
    last: asyncio.Future[int | None]
    """Of the number of the last step that is sent again. Done already where nobody waits for it any more."""


class Arrivals:
    """All that comes into a session: from its client, and from the server before, which the client names."""

    def __init__(self, client: Stream) -> None:
        self.client = client
        self.inlet: Stream | None = None
        """Of the server before, while it pushes."""
        self.attempt = 0
        """The last one that the client has named."""
        self.active_s = time.monotonic()
        """When something last came."""
        self._queue: deque[Arrival | WaitingReplay] = deque()
        """The wire's credit, which goes back when a message's turn comes, bounds it."""
        self._early: list[Arrival] = []
        """Steps that the server before has sent of an attempt of which the client has not spoken yet."""
        self._waiter: asyncio.Future[None] | None = None
        """Of who does it, while there is nothing to do."""
        self._replays: set[asyncio.Future[int | None]] = set()
        """Of requests to replay that were not answered yet."""
        self._num_replays = 0
        """That are in the queue."""
        self._received: int | None = None
        self._computed: int | None = None
        self._previous: PeerId | None = None
        self._routed = asyncio.Event()
        """Somebody else is the one before."""

    # --- what comes ---------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Take what the client sends."""
        self.client.hand_on(functools.partial(self._note, self.client))

    async def follow(self, stream: Stream, *, timeout_s: float) -> None:
        """Take what the server before sends, until its stream ends or the client names another one.

        Raises:
            NoSessionError: the client does not name this one within ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._previous != stream.peer_id:
                    await self._routed.wait()  # the client has told the server before, and us in a moment
        except TimeoutError:
            raise no_session() from None
        self._close_inlet()
        self.inlet = stream
        stream.hand_on(functools.partial(self._note, stream))
        await stream.send(Pushed())
        while True:
            await stream.receive(timeout_s=None)  # its end

    def expect(self, previous: PeerId | None) -> None:
        """The client says who is the one before."""
        if previous != self._previous:
            self._close_inlet()
            self._previous = previous
            self._routed.set()
            self._routed = asyncio.Event()

    def begin_attempt(self, attempt: int) -> None:
        """The client has named an attempt."""
        if attempt > self.attempt:
            self.attempt = attempt
            self._received = self._computed = None
            early, self._early = self._early, []
            for arrival in early:
                self._note(arrival.stream, arrival.event)

    def add_replay(self, request: Replay) -> asyncio.Future[int | None]:
        """Let a request to replay wait for its turn, behind what has come; ``drop_replay`` is to follow.

        Raises:
            OverloadedError: too many wait for theirs.
        """
        if self._num_replays >= _MAX_REPLAYS:
            raise OverloadedError("too many replays of this session wait already", retry_after_s=1.0)
        self._num_replays += 1
        self.begin_attempt(request.attempt)
        last: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._replays.add(last)
        self._put(WaitingReplay(request, last))
        return last

    def drop_replay(self, last: asyncio.Future[int | None]) -> None:
        """Nobody waits for it any more, or it was answered."""
        self._replays.discard(last)

    def _note(self, stream: Stream, event: MessageReceived) -> None:
        """Put what the client or the server before has sent at the end of the queue."""
        self.active_s = time.monotonic()
        arrival = Arrival(stream, event, self.active_s)
        body = event.message.body
        if isinstance(body, NewAttempt) and stream is self.client:
            arrival.accept()
            self.begin_attempt(body.attempt)
            return
        if isinstance(body, Step):
            if body.attempt > self.attempt:
                if stream is not self.client:
                    self._early.append(arrival)
                    return
                self.begin_attempt(body.attempt)
            if body.attempt == self.attempt:
                self._received = body.step
        self._put(arrival)

    def _put(self, item: Arrival | WaitingReplay) -> None:
        self._queue.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _close_inlet(self) -> None:
        """What has come through it, and was not begun, counts no more."""
        if self.inlet is not None:
            self.inlet.cancel()
            self.inlet = None
        for arrival in self._early:
            arrival.accept()
        self._early.clear()

    # --- what is done with it -----------------------------------------------------------------------------------------

    async def take(self) -> Arrival | WaitingReplay:
        """What is to be done next, once there is something; a message's credit goes back."""
        if not self._queue:
            await self._wait()
        item = self._queue.popleft()
        if isinstance(item, Arrival):
            item.accept()
        else:
            self._num_replays -= 1
        return item

    async def wait(self, timeout_s: float) -> None:
        """Wait until there is something to be done next, at most so long."""
        if not self._queue:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def next(self) -> Arrival | None:
        """What :meth:`take` would return now, if that is a message."""
        item = self._queue[0] if self._queue else None
        return item if isinstance(item, Arrival) else None

    def note_computed(self, step: Step) -> None:
        """The session has computed a step."""
        if step.attempt == self.attempt:
            self._computed = step.step

    def progress(self) -> Progress:
        """How far the attempt is."""
        return Progress(attempt=self.attempt, received=self._received, computed=self._computed)

    def close(self) -> None:
        """Take nothing more from the server before. What was not begun costs its senders no credit."""
        if self.inlet is not None:
            self.inlet.cancel()
        for item in (*self._queue, *self._early):
            if isinstance(item, Arrival):
                item.accept()

    def fail_replays(self) -> None:
        """Nobody will do what was asked for: the session is over."""
        for last in self._replays:
            if not last.done():
                last.set_exception(no_session())


def no_session() -> NoSessionError:
    """What a peer is told that asks for a session that does not exist, or not for it."""
    return NoSessionError("there is no such session here, or it takes nothing from you")
