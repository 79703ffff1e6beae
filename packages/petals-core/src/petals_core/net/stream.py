"""One stream of a connection: messages in both directions, for one session or one call."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from petals_core.addresses import source_of
from petals_core.errors import CancelledByPeerError, DeadlineExceededError, PetalsError
from petals_core.identity import PeerId
from petals_core.wire.connection import MessageReceived
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Body, Buffer, Failure, Message

if TYPE_CHECKING:
    from petals_core.net.connection import PeerConnection


class EndOfStreamError(PetalsError):
    """The peer ended the stream in order: no further message comes."""

    code = "end_of_stream"


class Stream:
    """Messages to and from one peer, in order. One task may receive at a time; any may send.

    What breaks the stream (a lost connection, the peer's cancellation) is raised by every later call, behind the
    messages that came before it.
    """

    __slots__ = (
        "_connection",
        "_ended",
        "_error",
        "_handler",
        "_inbox",
        "_on_message",
        "_packing",
        "_waiter",
        "peer_id",
        "priority",
        "stream_id",
    )

    def __init__(self, connection: PeerConnection, stream_id: int, priority: Priority) -> None:
        self.peer_id: PeerId = connection.peer_id
        """The authenticated identity of the other end."""
        self.stream_id = stream_id
        self.priority = priority
        """Of messages sent from now on."""
        self._connection = connection
        self._inbox: deque[MessageReceived] = deque()
        self._on_message: Callable[[MessageReceived], None] | None = None
        self._packing = asyncio.Lock()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: PetalsError | None = None
        self._handler: asyncio.Task[None] | None = None

    @property
    def source(self) -> str:
        """What limits per source count the other end as: its IPv4 address, or the network of its IPv6 address."""
        return source_of(self._connection.address.host)

    @property
    def is_open(self) -> bool:
        """Whether the stream is neither broken nor ended in both directions."""
        return self._error is None and self._connection.wire.is_open(self.stream_id)

    async def send(
        self,
        body: Body,
        payload: Sequence[Buffer] = (),
        *,
        end: bool = False,
        timeout_s: float | None = None,
        backlog_bytes: int = 0,
    ) -> None:
        """Send a message; ``end`` ends our direction with it. Returns when the transport has taken all of it.

        It waits while the peer gives no credit or the network is slow. The payload is not copied, so it must not change
        before this returns. When the wait is cancelled or its deadline passes the message stays in the queue:
        ``cancel`` the stream unless it may still go. With ``backlog_bytes`` it returns as soon as the stream's queue
        holds no more than that, and the payload must never change.

        Raises:
            FrameTooLargeError: the peer takes no message of this size.
            CancelledByPeerError: our direction has ended, or the peer gave up the stream without a reason.
            PeerConnectionError: the connection is lost.
            DeadlineExceededError: it took longer than ``timeout_s``.
            PetalsError: the peer gave up the stream, for this reason.
        """
        if self._error is not None:
            raise _again(self._error)
        connection = self._connection
        if self._packing.locked() or connection.packer.may_pack(body, payload):
            async with self._packing:  # fair, so that messages keep their order
                body, payload = await connection.packer.pack(body, payload)
            if self._error is not None:
                raise _again(self._error)
        connection.wire.send_message(self.stream_id, body, payload, end=end, priority=self.priority)
        connection.flush()
        if connection.wire.queued_bytes(self.stream_id) > backlog_bytes:
            await connection.sent(self, timeout_s, backlog_bytes)
        if end:
            connection.forget_if_over(self)

    def send_now(self, body: Body, payload: Sequence[Buffer] = ()) -> bool:
        """``send`` where there is nothing to wait for; else False, and nothing was done. The payload must never change.

        Raises:
            PetalsError: as ``send`` does.
        """
        if self._error is not None:
            raise _again(self._error)
        connection = self._connection
        is_idle = connection.wire.queued_bytes(self.stream_id) == 0
        if not is_idle or self._packing.locked() or connection.packer.may_pack(body, payload):
            return False
        connection.wire.send_message(self.stream_id, body, payload, priority=self.priority)
        connection.flush()
        return True

    async def receive(self, *, timeout_s: float | None) -> Message:
        """Return the next message.

        Raises:
            DeadlineExceededError: none came within ``timeout_s``.
            EndOfStreamError: the peer has ended its direction.
            PeerConnectionError: the connection is lost.
            CancelledByPeerError: the peer gave up the stream without a reason, or we did.
            PetalsError: a ``Failure`` was received (the stream goes on unless it ended), or the peer gave up the stream
                for this reason.
        """
        inbox = self._inbox
        if not inbox:
            await self._arrival(timeout_s)
        return self.accept(inbox.popleft())

    def hand_on(self, on_message: Callable[[MessageReceived], None]) -> None:
        """Call ``on_message`` with what comes, at once and before the stream ends, beginning with what has come.

        It is to ``accept`` each message when there is room for the next one. From now on ``receive`` waits for the end
        of the stream alone, and tells it as ever.
        """
        self._on_message = on_message
        while self._inbox:
            on_message(self._inbox.popleft())

    def accept(self, event: MessageReceived) -> Message:
        """The message of an event, whose credit goes back to the peer with it; once for each.

        Raises:
            PetalsError: it is a ``Failure``, which says this.
        """
        if self._connection.wire.consumed(event):
            self._connection.flush()
        message = event.message
        if type(message.body) is Failure:
            raise message.body.to_error()
        return message

    async def finish(self) -> None:
        """End our direction behind what was sent. The peer's goes on."""
        self._connection.wire.end_stream(self.stream_id)
        self._connection.flush()
        self._connection.forget_if_over(self)

    def cancel(self, error: PetalsError | None = None) -> None:
        """Give up both directions, drop what has not been received, and tell the peer, which sees ``error``.

        Idempotent; never blocks. A stream that has ended in both directions is not worth a word to the peer.
        """
        self.lose(error or CancelledByPeerError("the stream was given up on this side"))
        self._connection.wire.cancel_stream(self.stream_id, error)
        for event in self._inbox:
            self._connection.wire.consumed(event)
        self._inbox.clear()
        self._connection.flush()
        self._connection.forget_if_over(self)

    def abandon(self) -> None:
        """Drop whatever still comes, once our direction has ended; the peer is not told and may end in peace."""
        for event in self._inbox:
            self._connection.wire.consumed(event)
        self._inbox.clear()
        self._connection.forget(self)

    async def fail(self, error: PetalsError, *, end: bool = True) -> None:
        """Tell the peer that its request failed: its ``receive`` raises ``error``. ``end`` ends our direction too."""
        await self.send(Failure.of(error), end=end)

    # --- called by the connection and the listener

    def deliver(self, event: MessageReceived) -> None:
        """A message has come."""
        if self._on_message is not None:
            self._on_message(event)
            return
        self._inbox.append(event)
        self._wake()

    def end(self) -> None:
        """The peer has ended its direction."""
        self._ended = True
        self._wake()

    def lose(self, error: PetalsError) -> None:
        """Nothing can be sent any more, and nothing comes behind what has come. The first reason counts."""
        if self._error is None:
            self._error = error
            self._wake()

    def lose_by_peer(self, error: PetalsError) -> None:
        """The peer has vanished or given up the stream: also cancels the stream's handler."""
        self.lose(error)
        if self._handler is not None:
            self._handler.cancel()

    def own(self, handler: asyncio.Task[None]) -> None:
        """Cancel ``handler`` when the peer vanishes or gives up the stream."""
        self._handler = handler

    @property
    def error(self) -> PetalsError | None:
        """What broke the stream."""
        return self._error and _again(self._error)

    async def _arrival(self, timeout_s: float | None) -> None:
        """Wait until the inbox holds something."""
        if self._waiter is not None:
            raise RuntimeError("two tasks receive on one stream")
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while not self._inbox:
            if self._ended:
                raise EndOfStreamError(f"peer {self.peer_id.short} ended the stream")
            if self._error is not None:
                raise _again(self._error)
            waiter = self._waiter = loop.create_future()
            timer = None if deadline is None else loop.call_at(deadline, self._expire, waiter)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()

    def _expire(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            waiter.set_exception(DeadlineExceededError(f"peer {self.peer_id.short} did not answer in time"))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _again(error: PetalsError) -> PetalsError:
    """A fresh copy to raise: one exception object raised in several tasks would gather all their tracebacks."""
    copy = type(error)(error.message, retry_after_s=error.retry_after_s)
    copy.__cause__ = error.__cause__
    return copy
