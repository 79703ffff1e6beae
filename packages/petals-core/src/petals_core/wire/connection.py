"""A connection after its hello, as a value machine: bytes and time in, events and bytes to send out.

Streams carry messages in both directions; each end opens streams (the dialer's ids are odd). Messages of one stream stay in
order; those of different streams interleave frame by frame, DECODE before BULK before BACKGROUND, never starving and
round-robin within a priority.

Credit. A message costs ``message_cost``: about its size. It may *begin* while less than ``stream_credit_bytes`` is
outstanding on its stream and less than ``connection_credit_bytes`` in its lane (lane 0: DECODE messages of at most one
stream credit; lane 1: all others); once begun it flows to its end without waiting, so that a half-received message
never waits for another one. Its cost stays outstanding until the receiver calls ``consumed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from petals_core.errors import PetalsError
from petals_core.limits import WireLimits
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Body, Buffer, Message


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream; answers are best sent with its ``priority``."""

    stream_id: int
    priority: Priority


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A whole message. Call ``Connection.consumed(event)`` exactly once when the application took it or dropped it."""

    stream_id: int
    message: Message
    priority: Priority
    cost: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The peer sends no further messages on the stream; ours still go."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamCancelled:
    """Both directions of the stream are over before their end: the peer gave it up, or sent a malformed message."""

    stream_id: int
    error: PetalsError


@dataclass(frozen=True, slots=True)
class PeerDraining:
    """The peer takes no new streams; those that are open go on."""


@dataclass(frozen=True, slots=True)
class PongReceived:
    """A ping came back."""

    rtt_s: float


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The last event: all streams are gone. ``error`` is None after an orderly close by the peer."""

    error: PetalsError | None


Event: TypeAlias = (
    StreamOpened | MessageReceived | StreamEnded | StreamCancelled | PeerDraining | PongReceived | ConnectionClosed
)


class Connection:
    """One end of a connection. Not thread-safe; all times are seconds of one monotonic clock.

    After every call that may have queued something (all but the properties), the shell sends what ``data_to_send``
    gives, and calls ``handle_timeout`` when ``next_wakeup`` has come. It writes a new batch only when its transport has
    little left to send, for what is in the transport's buffer can no longer be overtaken.
    """

    def __init__(self, *, is_dialer: bool, local_limits: WireLimits, remote_limits: WireLimits, now: float) -> None:
        raise NotImplementedError

    # --- sending

    def open_stream(self, priority: Priority = Priority.BULK) -> int:
        """Open a stream and return its id.

        Raises:
            DrainingError: the peer takes no new streams.
            OverloadedError: the peer allows no more streams at once.
            PeerConnectionError: the connection is closed.
        """
        raise NotImplementedError

    def send_message(
        self,
        stream_id: int,
        body: Body,
        payload: Sequence[Buffer] = (),
        *,
        end: bool = False,
        priority: Priority | None = None,
    ) -> None:
        """Queue a message; ``end`` ends our direction with it. ``priority`` is the stream's unless given.

        The payload's buffers are kept as they are, without a copy: they must not change until they were sent.

        Raises:
            FrameTooLargeError: the message is larger than the peer takes; nothing is queued.
            PeerConnectionError: the connection is closed.
            CancelledByPeerError: the stream is gone, or our direction has ended.
        """
        raise NotImplementedError

    def end_stream(self, stream_id: int) -> None:
        """End our direction behind what is queued. Does nothing when it has ended or the stream is gone."""
        raise NotImplementedError

    def cancel_stream(self, stream_id: int, error: PetalsError | None = None) -> None:
        """Give up both directions at once and tell the peer why. What is queued is dropped; no event follows.

        Does nothing when the stream is gone.
        """
        raise NotImplementedError

    def consumed(self, event: MessageReceived) -> None:
        """Give back the credit of a received message; also for streams that have ended or were cancelled since."""
        raise NotImplementedError

    def ping(self, now: float) -> None:
        """Queue a ping (unless several are under way); ``PongReceived`` follows."""
        raise NotImplementedError

    def drain(self) -> None:
        """Tell the peer to open no new streams; those that still arrive are refused with ``DrainingError``."""
        raise NotImplementedError

    def close(self, error: PetalsError | None = None) -> None:
        """Drop all streams and queue a last frame that says why. Idempotent; no event follows."""
        raise NotImplementedError

    def data_to_send(self, max_bytes: int = 1 << 16) -> list[Buffer]:
        """Return and forget the next buffers to write, in order; empty when there is nothing to send now.

        Frames stay whole: none is started once ``max_bytes`` are reached, so the sum may exceed it by one frame.
        """
        raise NotImplementedError

    def queued_bytes(self, stream_id: int) -> int:
        """Bytes of messages on the stream that ``data_to_send`` did not give out yet; 0 when the stream is gone.

        A sender waits while this is high; check again after each ``data_to_send``.
        """
        raise NotImplementedError

    # --- receiving and time

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Take bytes from the peer. Raises nothing: whatever breaks the protocol ends in ``ConnectionClosed``.

        Received payloads may be views of ``data``.
        """
        raise NotImplementedError

    def receive_eof(self, now: float) -> list[Event]:
        """The transport has ended: ``ConnectionClosed`` with ``PeerConnectionError`` unless closed before."""
        raise NotImplementedError

    def next_wakeup(self) -> float | None:
        """When ``handle_timeout`` is to be called; None when closed."""
        raise NotImplementedError

    def handle_timeout(self, now: float) -> list[Event]:
        """Queue a ping after silence; close a connection that was silent for too long. Harmless when early."""
        raise NotImplementedError

    # --- state

    @property
    def is_closed(self) -> bool:
        """Closed by either side; what ``data_to_send`` still gives is to be sent before the transport closes."""
        raise NotImplementedError

    @property
    def is_draining(self) -> bool:
        """Either side drains: no new streams by us."""
        raise NotImplementedError

    @property
    def num_streams(self) -> int:
        """Streams that are open, of both ends."""
        raise NotImplementedError

    def is_open(self, stream_id: int) -> bool:
        """Whether the stream exists: not cancelled and not ended in both directions."""
        raise NotImplementedError
