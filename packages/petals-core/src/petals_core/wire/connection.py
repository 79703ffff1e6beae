"""A connection after its hello, as a value machine: bytes and time in, events and bytes to send out.

Streams carry messages in both directions; each end opens streams (the dialer's ids are odd). Messages of one stream
stay in order; those of different streams interleave frame by frame, DECODE before BULK before BACKGROUND, never
starving, and round-robin within a priority. What bounds memory is in ``petals_core.wire.credit``: a message counts
from its first frame until the receiver's ``consumed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from petals_core.errors import (
    CancelledByPeerError,
    DrainingError,
    OverloadedError,
    PeerConnectionError,
    PetalsError,
    ProtocolError,
)
from petals_core.limits import WireLimits
from petals_core.wire.credit import NUM_LANES, ReceiveAccount, lane_of
from petals_core.wire.events import (
    ConnectionClosed,
    Event,
    MessageReceived,
    PeerDraining,
    PongReceived,
    StreamCancelled,
    StreamEnded,
    StreamOpened,
)
from petals_core.wire.frames import (
    CONNECTION_CREDIT,
    DATA,
    FLAG_BEGIN,
    FLAG_END,
    MAX_STREAM_ID,
    PING_BYTES,
    PRIORITY_SHIFT,
    STREAM_CREDIT,
    FrameType,
    Header,
    Priority,
    decode_error,
    encode_error,
    encode_frame,
)
from petals_core.wire.inbox import Assembly, FrameReader
from petals_core.wire.keepalive import Allowance, Keepalive
from petals_core.wire.messages import Body, Buffer, encode_body
from petals_core.wire.outbox import Outbox

__all__ = [
    "Connection",
    "ConnectionClosed",
    "Event",
    "MessageReceived",
    "PeerDraining",
    "PongReceived",
    "StreamCancelled",
    "StreamEnded",
    "StreamOpened",
]

_MAX_CONTROL_FRAMES = 1024
"""Answers that may wait for a peer that does not read, besides one for each stream."""
_RESET_RATE_PER_S = 100.0
_PING_BURST = 64
_PING_RATE_PER_S = 16.0


class _Stream:
    """The receiving half of a stream, and what is left of the sending one."""

    __slots__ = ("account", "assembly", "has_local_end", "has_remote_end")

    def __init__(self, credit_bytes: int) -> None:
        self.account = ReceiveAccount(credit_bytes)
        self.assembly: Assembly | None = None
        self.has_local_end = False
        """Whether our last frame was given out."""
        self.has_remote_end = False


class Connection:
    """One end of a connection. Not thread-safe; all times are seconds of one monotonic clock.

    After every call that may have queued something (all but the properties), the shell sends what ``data_to_send``
    gives, and calls ``handle_timeout`` when ``next_wakeup`` has come. It writes a new batch only when its transport has
    little left to send, for what is in the transport's buffer can no longer be overtaken.
    """

    def __init__(self, *, is_dialer: bool, local_limits: WireLimits, remote_limits: WireLimits, now: float) -> None:
        self._local = local_limits
        self._remote = remote_limits
        self._next_id = 1 if is_dialer else 2
        self._next_peer_id = 2 if is_dialer else 1
        self._streams: dict[int, _Stream] = {}
        self._num_opened_here = 0
        self._reader = FrameReader(local_limits.max_frame_bytes)
        self._outbox = Outbox(remote_limits)
        self._control: list[bytes] = []
        self._lanes = tuple(ReceiveAccount(local_limits.connection_credit_bytes) for _ in range(NUM_LANES))
        self._keepalive = Keepalive(
            ping_interval_s=local_limits.ping_interval_s, idle_timeout_s=local_limits.idle_timeout_s, now=now
        )
        self._resets = Allowance(burst=4 * local_limits.max_streams + 64, rate_per_s=_RESET_RATE_PER_S, now=now)
        self._pings = Allowance(burst=_PING_BURST, rate_per_s=_PING_RATE_PER_S, now=now)
        self._is_closed = False
        self._close_error: PetalsError | None = None
        self._is_draining_here = False
        self._is_draining_there = False

    # --- sending ------------------------------------------------------------------------------------------------------

    def open_stream(self, priority: Priority = Priority.BULK) -> int:
        """Open a stream and return its id.

        Raises:
            DrainingError: the peer takes no new streams, or this end drains.
            OverloadedError: the peer allows no more streams at once.
            PeerConnectionError: the connection is closed, or has used up its stream ids.
        """
        self._check_open()
        if self.is_draining:
            raise DrainingError("the peer is about to stop and takes no new requests: ask another server")
        if self._num_opened_here >= self._remote.max_streams:
            raise OverloadedError(f"{self._num_opened_here} streams are open, and the peer takes no more at once")
        stream_id = self._next_id
        if stream_id > MAX_STREAM_ID:
            raise PeerConnectionError("the connection has used up its stream ids: connect again")
        self._next_id += 2
        self._num_opened_here += 1
        self._add_stream(stream_id, priority)
        self._control.append(encode_frame(FrameType.OPEN, stream_id=stream_id, flags=priority << PRIORITY_SHIFT))
        return stream_id

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

        The payload's buffers are kept as they are, without a copy: they must not change until they were sent. A
        message never overtakes another one of its own stream.

        Raises:
            FrameTooLargeError: the message is larger than the peer takes; nothing is queued.
            PeerConnectionError: the connection is closed.
            CancelledByPeerError: the stream is gone, or our direction has ended.
        """
        self._check_open()
        if not self._outbox.takes(stream_id):
            raise CancelledByPeerError(f"stream {stream_id} is over")
        self._outbox.add_message(stream_id, encode_body(body), payload, priority, end=end)

    def end_stream(self, stream_id: int) -> None:
        """End our direction behind what is queued. Does nothing when it has ended or the stream is gone."""
        if self._outbox.takes(stream_id):
            self._outbox.add_end(stream_id)

    def cancel_stream(self, stream_id: int, error: PetalsError | None = None) -> None:
        """Give up both directions at once and tell the peer why. What is queued is dropped; no event follows.

        Does nothing when the stream is gone.
        """
        if stream_id in self._streams:
            self._remove_stream(stream_id)
            self._send_cancel(stream_id, error or CancelledByPeerError("the peer gave up the request"))

    def consumed(self, event: MessageReceived) -> bool:
        """Give back the credit of a received message; also for streams that have ended or were cancelled since.

        Returns whether the peer is to be told of it now, so that there is something to send.
        """
        if self._is_closed:
            return False
        self._give_back_lane(event.priority, event.cost)
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            stream.account.taken(event.cost)
            if stream.account.is_due and not stream.has_remote_end:
                credit = STREAM_CREDIT.pack(stream.account.collect())
                self._control.append(encode_frame(FrameType.CREDIT, credit, stream_id=event.stream_id))
        return bool(self._control)

    def ping(self, now: float) -> None:
        """Queue a ping (unless several are under way); ``PongReceived`` follows."""
        if not self._is_closed:
            number = self._keepalive.ping(now)
            if number is not None:
                self._control.append(encode_frame(FrameType.PING, number.to_bytes(PING_BYTES, "big")))

    def drain(self) -> None:
        """Tell the peer to open no new streams; those that still arrive are refused with ``DrainingError``."""
        if not self._is_closed and not self._is_draining_here:
            self._is_draining_here = True
            self._control.append(encode_frame(FrameType.DRAIN))

    def close(self, error: PetalsError | None = None) -> None:
        """Drop all streams and queue a last frame that says why. Idempotent; no event follows."""
        if not self._is_closed:
            self._control.append(encode_frame(FrameType.CLOSE, b"" if error is None else encode_error(error)))
            self._forget(error)

    def data_to_send(self, max_bytes: int = 1 << 16) -> list[Buffer]:
        """Return and forget the next buffers to write, in order; empty when there is nothing to send now.

        Frames stay whole: none is started once ``max_bytes`` are reached, so the sum may exceed it by one frame (and
        by control frames, which are few and small).
        """
        buffers: list[Buffer] = []
        if self._control:
            buffers.append(b"".join(self._control))
            self._control.clear()
        for stream_id in self._outbox.take_frames(buffers, max_bytes):
            stream = self._streams[stream_id]
            stream.has_local_end = True
            if stream.has_remote_end:
                self._remove_stream(stream_id)
        return buffers

    def queued_bytes(self, stream_id: int) -> int:
        """Bytes of messages on the stream that ``data_to_send`` did not give out yet; 0 when the stream is gone.

        A sender waits while this is high; check again after each ``data_to_send``.
        """
        return self._outbox.queued_bytes(stream_id)

    # --- receiving and time -------------------------------------------------------------------------------------------

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Take bytes from the peer. Raises nothing: whatever breaks the protocol ends in ``ConnectionClosed``.

        Received payloads may be views of ``data``.
        """
        events: list[Event] = []
        if self._is_closed:
            return events
        self._keepalive.heard(now)
        try:
            for header, payload in self._reader.feed(data):
                if header.type is DATA:
                    self._receive_data_frame(header, payload, events, now)
                else:
                    self._receive_control_frame(header, payload, events, now)
                if self._is_closed:
                    break
            if len(self._control) > _MAX_CONTROL_FRAMES + self._local.max_streams:
                raise ProtocolError("the peer asks much and does not read the answers")
        except ProtocolError as error:
            self._fail(error, events)
        return events

    def receive_eof(self, now: float) -> list[Event]:
        """The transport has ended: ``ConnectionClosed`` with ``PeerConnectionError`` unless closed before."""
        if self._is_closed:
            return []
        error = PeerConnectionError("the connection to the peer was lost")
        self._forget(error)
        return [ConnectionClosed(error)]

    def next_wakeup(self) -> float | None:
        """When ``handle_timeout`` is to be called; None when closed."""
        return None if self._is_closed else self._keepalive.next_wakeup()

    def handle_timeout(self, now: float) -> list[Event]:
        """Queue a ping after silence; close a connection that was silent for too long. Harmless when early."""
        events: list[Event] = []
        if self._is_closed:
            return events
        if self._keepalive.is_dead(now):
            silence_s = self._local.idle_timeout_s
            self._fail(PeerConnectionError(f"the peer gave no sign of life for {silence_s:.0f} s"), events)
        elif self._keepalive.wants_ping(now):
            self.ping(now)
        return events

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Closed by either side; what ``data_to_send`` still gives is to be sent before the transport closes."""
        return self._is_closed

    @property
    def is_draining(self) -> bool:
        """Either side drains: no new streams by us."""
        return self._is_draining_here or self._is_draining_there

    @property
    def num_streams(self) -> int:
        """Streams that are open, of both ends."""
        return len(self._streams)

    def is_open(self, stream_id: int) -> bool:
        """Whether the stream exists: not cancelled and not ended in both directions."""
        return stream_id in self._streams

    # --- inner --------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            reason = "it is closed" if self._close_error is None else self._close_error.message
            raise PeerConnectionError(f"the connection can't be used: {reason}")

    def _add_stream(self, stream_id: int, priority: Priority) -> None:
        self._streams[stream_id] = _Stream(self._local.stream_credit_bytes)
        self._outbox.add_stream(stream_id, priority)

    def _remove_stream(self, stream_id: int) -> None:
        """Forget a stream; an unfinished message of it takes no room any longer."""
        stream = self._streams.pop(stream_id)
        self._outbox.remove_stream(stream_id)
        if self._is_own(stream_id):
            self._num_opened_here -= 1
        if stream.assembly is not None:
            self._give_back_lane(stream.assembly.priority, stream.assembly.cost)

    def _is_own(self, stream_id: int) -> bool:
        return stream_id % 2 == self._next_id % 2

    def _give_back_lane(self, priority: Priority, cost: int) -> None:
        lane = self._lanes[lane_of(priority, cost, self._local.stream_credit_bytes)]
        lane.taken(cost)
        if lane.is_due:
            credit = CONNECTION_CREDIT.pack(*(lane.collect() for lane in self._lanes))
            self._control.append(encode_frame(FrameType.CREDIT, credit))

    def _send_cancel(self, stream_id: int, error: PetalsError) -> None:
        self._control.append(encode_frame(FrameType.CANCEL, encode_error(error), stream_id=stream_id))

    def _fail(self, error: PetalsError, events: list[Event]) -> None:
        self.close(error)
        events.append(ConnectionClosed(error))

    def _forget(self, error: PetalsError | None) -> None:
        self._is_closed = True
        self._close_error = error
        self._streams.clear()
        self._num_opened_here = 0
        self._outbox.clear()

    def _receive_data_frame(self, header: Header, payload: memoryview, events: list[Event], now: float) -> None:
        stream_id = header.stream_id
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_was_open(stream_id)
        elif stream.has_remote_end:
            raise ProtocolError(f"DATA frame behind the end of stream {stream_id}")
        if header.flags & FLAG_BEGIN:
            assembly = Assembly(payload, header.priority, self._local)
            lane = lane_of(assembly.priority, assembly.cost, self._local.stream_credit_bytes)
            self._lanes[lane].begin(assembly.cost)
            if stream is None:  # Cancelled by us, which the peer did not know when it sent this.
                self._give_back_lane(assembly.priority, assembly.cost)
                return
            if stream.assembly is not None:
                raise ProtocolError(f"a message begins within another one on stream {stream_id}")
            stream.account.begin(assembly.cost)
            stream.assembly = assembly
            assembly.begin(payload)
        elif stream is None:
            return
        elif stream.assembly is not None:
            stream.assembly.add(payload)
        elif len(payload):
            raise ProtocolError(f"a frame without a message on stream {stream_id}")
        if stream.assembly is not None:
            if stream.assembly.is_complete:
                if not self._deliver(stream_id, stream, stream.assembly, events, now):
                    return
            elif header.flags & FLAG_END:
                raise ProtocolError(f"stream {stream_id} ends within a message")
        if header.flags & FLAG_END:
            stream.has_remote_end = True
            events.append(StreamEnded(stream_id))
            if stream.has_local_end:
                self._remove_stream(stream_id)

    def _deliver(self, stream_id: int, stream: _Stream, assembly: Assembly, events: list[Event], now: float) -> bool:
        """Hand on a complete message; a malformed one costs the stream, and the result is False."""
        try:
            message = assembly.message()
        except ProtocolError as error:
            self._check_reset(now)
            self._remove_stream(stream_id)
            self._send_cancel(stream_id, error)
            events.append(StreamCancelled(stream_id, error))
            return False
        stream.assembly = None
        events.append(MessageReceived(stream_id, message, assembly.priority, assembly.cost))
        return True

    def _receive_control_frame(self, header: Header, payload: memoryview, events: list[Event], now: float) -> None:
        stream_id = header.stream_id
        match header.type:
            case FrameType.OPEN:
                self._receive_open(stream_id, header.priority, events, now)
            case FrameType.CANCEL:
                self._check_was_open(stream_id)
                if not self._is_own(stream_id):
                    self._check_reset(now)
                error = decode_error(payload)
                if stream_id in self._streams:
                    self._remove_stream(stream_id)
                    events.append(StreamCancelled(stream_id, error))
            case FrameType.CREDIT:
                self._receive_credit(stream_id, payload)
            case FrameType.PING:
                if not self._pings.take(now):
                    raise ProtocolError("the peer pings too often")
                self._control.append(encode_frame(FrameType.PONG, bytes(payload)))
            case FrameType.PONG:
                events.append(PongReceived(self._keepalive.pong(int.from_bytes(payload, "big"), now)))
            case FrameType.DRAIN:
                if not self._is_draining_there:
                    self._is_draining_there = True
                    events.append(PeerDraining())
            case FrameType.CLOSE:
                closing = decode_error(payload) if payload else None
                self._control.clear()
                self._forget(closing)
                events.append(ConnectionClosed(closing))
            case FrameType.DATA:
                raise AssertionError("DATA frames are handled elsewhere")
            case never:
                assert_never(never)

    def _receive_open(self, stream_id: int, priority: Priority, events: list[Event], now: float) -> None:
        if stream_id != self._next_peer_id:
            raise ProtocolError(f"stream {stream_id} is opened where {self._next_peer_id} comes next")
        self._next_peer_id += 2
        if self._is_draining_here:
            self._check_reset(now)
            self._send_cancel(stream_id, DrainingError("the peer is about to stop: ask another server"))
            return
        if len(self._streams) - self._num_opened_here >= self._local.max_streams:
            raise ProtocolError(f"more than {self._local.max_streams} streams are open at once")
        self._add_stream(stream_id, priority)
        events.append(StreamOpened(stream_id, priority))

    def _receive_credit(self, stream_id: int, payload: memoryview) -> None:
        amounts = (STREAM_CREDIT if stream_id else CONNECTION_CREDIT).unpack(payload)
        if not any(amounts):
            raise ProtocolError("CREDIT frame of nothing")
        if stream_id == 0:
            for lane, num_bytes in enumerate(amounts):
                self._outbox.give_back_lane(lane, num_bytes)
        elif stream_id in self._streams:
            self._outbox.give_back_stream(stream_id, amounts[0])
        else:
            self._check_was_open(stream_id)

    def _check_was_open(self, stream_id: int) -> None:
        if stream_id >= (self._next_id if self._is_own(stream_id) else self._next_peer_id):
            raise ProtocolError(f"stream {stream_id} was never opened")

    def _check_reset(self, now: float) -> None:
        if not self._resets.take(now):
            raise ProtocolError("the peer opens and breaks off streams too often")
