"""A connection to one authenticated peer: the wire's value machine driven by asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import assert_never

from petals_core.addresses import Address
from petals_core.errors import DeadlineExceededError, InvalidRequestError, PeerConnectionError, PetalsError
from petals_core.identity import PeerId
from petals_core.limits import WireLimits
from petals_core.net.link import Link
from petals_core.net.packing import Packer
from petals_core.net.stream import Stream
from petals_core.wire.compression import Mode
from petals_core.wire.connection import (
    Connection,
    ConnectionClosed,
    Event,
    MessageReceived,
    PeerDraining,
    PongReceived,
    StreamCancelled,
    StreamEnded,
    StreamOpened,
)
from petals_core.wire.frames import Priority
from petals_core.wire.hello import HelloResult

_BATCH_BYTES = 64 * 1024
"""What one write takes at least, where there is as much."""
_BURST_BYTES = 256 * 1024
"""What one turn of the event loop sends at most, so that bulk does not stop everything else."""
_RTT_WEIGHT = 1 / 8  # of a new measurement, RFC 6298 section 2.3


class PeerConnection:
    """An open connection to an authenticated peer. ``Dialer.connect`` and ``Listener`` make them."""

    # Time is ``time.monotonic``: uvloop's own clock stands still within a turn of the loop and counts milliseconds,
    # which is too coarse for round trips.

    def __init__(
        self,
        link: Link,
        hello: HelloResult,
        *,
        is_dialer: bool,
        address: Address,
        limits: WireLimits,
        rtt_s: float,
        compression: Mode = "none",
        on_stream: Callable[[Stream], None] | None = None,
        on_closed: Callable[[PeerConnection], None] | None = None,
    ) -> None:
        self.peer_id: PeerId = hello.peer_id
        """The authenticated identity of the other end."""
        self.address = address
        """Of the other end, as it was dialled or as its packets come from."""
        self.rtt_s = rtt_s
        """Smoothed round trip time in seconds, from the hello and the pings."""
        self.packer = Packer(compression, link.rate)
        """What is done to outgoing tensors."""
        self._loop = asyncio.get_running_loop()
        self.wire = Connection(
            is_dialer=is_dialer, local_limits=limits, remote_limits=hello.remote_limits, now=time.monotonic()
        )
        """The state machine; for streams. Whoever calls it calls ``flush`` afterwards."""
        self._link = link
        self._on_stream = on_stream
        self._on_closed = on_closed
        self._streams: dict[int, Stream] = {}
        self._senders: dict[asyncio.Future[None], tuple[Stream, int]] = {}
        """Who waits, for which stream's queue, to fall to how many bytes."""
        self._continuation: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: PetalsError | None = None
        self._set_timer()
        if hello.trailing:
            self._receive(hello.trailing)
        link.attach(self._receive, self.flush, self._lose)

    @property
    def is_closed(self) -> bool:
        """Whether the connection is gone, by whatever reason."""
        return self._error is not None

    @property
    def is_draining(self) -> bool:
        """Whether either end takes no new streams."""
        return self.wire.is_draining

    @property
    def num_streams(self) -> int:
        """Streams that are open."""
        return self.wire.num_streams

    @property
    def rate_bytes_per_s(self) -> float | None:
        """How fast the link takes bytes; None while nothing has had to wait."""
        return self._link.rate.bytes_per_s

    def open_stream(self, priority: Priority = Priority.BULK) -> Stream:
        """Open a stream. The peer learns of it with the first message.

        Raises:
            DrainingError: the peer takes no new streams.
            OverloadedError: as many streams are open as the peer allows.
            PeerConnectionError: the connection is gone.
        """
        if self._error is not None:
            raise PeerConnectionError(self._error.message)
        stream = Stream(self, self.wire.open_stream(priority), priority)
        self._streams[stream.stream_id] = stream
        return stream

    def ping(self) -> None:
        """Measure the round trip; ``rtt_s`` changes when the answer comes. Never blocks."""
        self.wire.ping(time.monotonic())
        self.flush()

    def drain(self) -> None:
        """Tell the peer to open no new streams. Never blocks."""
        self.wire.drain()
        self.flush()

    async def close(self, error: PetalsError | None = None) -> None:
        """Tell the peer why (``error``, or that all is well) and close; streams raise ``PeerConnectionError``.

        A peer that takes no bytes delays this by a second at most. Idempotent.
        """
        if self._error is None:
            self.wire.close(error)
            self.flush()
            self._shut(error or PeerConnectionError("the connection was closed on this side"))
        await self._link.close()

    # --- called by streams

    def flush(self) -> None:
        """Give the transport what it takes now; the rest goes when it takes more."""
        link, wire = self._link, self.wire
        burst_bytes = 0
        while not link.is_paused and (buffers := wire.data_to_send(_BATCH_BYTES)):
            num_bytes = link.write(buffers)
            burst_bytes += num_bytes
            if num_bytes < _BATCH_BYTES:
                break  # that was all that may go now
            if burst_bytes >= _BURST_BYTES:
                if self._continuation is None:
                    self._continuation = self._loop.call_soon(self._continue)
                break
        if self._senders:
            for future, (stream, backlog_bytes) in self._senders.items():
                if not future.done() and wire.queued_bytes(stream.stream_id) <= backlog_bytes:
                    future.set_result(None)

    async def sent(self, stream: Stream, timeout_s: float | None, backlog_bytes: int) -> None:
        """Wait until the queue holds at most ``backlog_bytes`` of the stream's messages."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._senders[future] = (stream, backlog_bytes)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            raise DeadlineExceededError(f"peer {self.peer_id.short} took no data for {timeout_s:g} s") from None
        finally:
            del self._senders[future]
        if stream.error is not None:
            raise stream.error

    def forget(self, stream: Stream) -> None:
        """Deliver nothing more to a stream; what still comes is dropped."""
        self._streams.pop(stream.stream_id, None)

    def forget_if_over(self, stream: Stream) -> None:
        """Forget a stream that has ended in both directions."""
        if not self.wire.is_open(stream.stream_id):
            self.forget(stream)

    # --- called by the link and the event loop

    def _receive(self, data: bytes) -> None:
        self._handle(self.wire.receive_data(data, time.monotonic()))

    def _lose(self, error: PetalsError) -> None:
        self.wire.receive_eof(time.monotonic())  # its only event says less than ``error``
        self._shut(error)

    def _continue(self) -> None:
        self._continuation = None
        self.flush()

    def _on_timer(self) -> None:
        self._handle(self.wire.handle_timeout(time.monotonic()))
        self._set_timer()

    def _set_timer(self) -> None:
        """Wake the state machine when it wants. Traffic only ever makes that later, so nothing is set on the way."""
        when = self.wire.next_wakeup()
        if when is None or self._error is not None:
            self._timer = None
        else:
            self._timer = self._loop.call_later(max(0.0, when - time.monotonic()), self._on_timer)

    def _handle(self, events: list[Event]) -> None:
        streams = self._streams
        for event in events:
            if isinstance(event, MessageReceived):
                stream = streams.get(event.stream_id)
                if stream is None:
                    self.wire.consumed(event)
                else:
                    stream.deliver(event)
            elif isinstance(event, StreamOpened):
                self._accept(event)
            elif isinstance(event, StreamEnded):
                if (stream := streams.get(event.stream_id)) is not None:
                    stream.end()
                    self.forget_if_over(stream)
            elif isinstance(event, StreamCancelled):
                if (stream := streams.pop(event.stream_id, None)) is not None:
                    stream.lose_by_peer(event.error)  # ``flush`` wakes its senders, who find nothing queued
            elif isinstance(event, PongReceived):
                self.rtt_s += (event.rtt_s - self.rtt_s) * _RTT_WEIGHT
            elif isinstance(event, PeerDraining):
                pass  # ``wire.is_draining`` says so from now on
            elif isinstance(event, ConnectionClosed):
                self.flush()
                self._shut(event.error or PeerConnectionError("it closed the connection"))
            else:
                assert_never(event)
        self.flush()

    def _accept(self, event: StreamOpened) -> None:
        if self._on_stream is None:
            self.wire.cancel_stream(event.stream_id, InvalidRequestError("this peer serves no requests"))
            return
        stream = self._streams[event.stream_id] = Stream(self, event.stream_id, event.priority)
        self._on_stream(stream)

    def _shut(self, error: PetalsError) -> None:
        """Everything ends: streams and their handlers, timers, the transport."""
        if self._error is not None:
            return
        if isinstance(error, PeerConnectionError):
            lost = PeerConnectionError(f"lost peer {self.peer_id.short} at {self.address}: {error.message}")
        else:
            lost = PeerConnectionError(f"peer {self.peer_id.short} at {self.address}: {error.message}")
        lost.__cause__ = error
        self._error = lost
        for handle in (self._timer, self._continuation):
            if handle is not None:
                handle.cancel()
        self._timer = self._continuation = None
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.lose_by_peer(lost)
        for future in self._senders:
            if not future.done():
                future.set_result(None)
        self._link.finish()
        if self._on_closed is not None:
            self._on_closed(self)
