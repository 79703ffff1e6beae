"""A TCP connection with TLS on it: the one asyncio protocol that both ends of a peer connection use."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import cast

from petals_core.errors import PeerConnectionError, PetalsError
from petals_core.net.congestion import read_progress, send_at_rate
from petals_core.net.tls import TlsChannel
from petals_core.wire.link_rate import LinkRate
from petals_core.wire.messages import Buffer
from petals_core.wire.pacing import PacingChoice
from petals_core.wire.throttle import Throttle

_HIGH_WATER_BYTES = 128 * 1024
"""What may wait in the transport, where nothing overtakes it any more."""
_RECEIVE_BYTES = 128 * 1024
"""What one call of the kernel receives. One buffer for all of them, as a fresh one would cost more than a step."""
_GRACE_S = 1.0
_MAX_UNREAD_BYTES = 128 * 1024


class Link(asyncio.BufferedProtocol):
    """Encrypted bytes to and from one other end.

    It is in the owner's set ``open_links`` while its socket is open. At first the owner awaits ``secured`` and then
    ``read``s the hello; ``attach`` then hands everything that arrives to callbacks, without a queue between.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        open_links: set[Link],
        *,
        is_listener: bool,
        on_made: Callable[[Link], None] | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        self.tls = TlsChannel(context, is_listener=is_listener)
        self.is_paused = False
        """Whether no more bytes are to be written for now: the transport is full, or the limit is reached."""
        self.remote: tuple[str, int] = ("", 0)
        """IP address and port of the other end."""
        self.rate = LinkRate()
        """What this link takes of what has to wait."""
        self._throttle = throttle
        self._throttled: asyncio.TimerHandle | None = None
        self._is_full = False
        self._paused_at_s = 0.0
        self._passed_bytes = 0
        self._pacing = PacingChoice()
        self._loop = asyncio.get_running_loop()
        self._open_links = open_links
        self._on_made = on_made
        self._transport: asyncio.Transport | None = None
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._linger: asyncio.TimerHandle | None = None
        self._error: PetalsError | None = None
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._unread = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._on_data: Callable[[bytes], None] | None = None
        self._on_writable: Callable[[], None] = lambda: None
        self._on_lost: Callable[[PetalsError], None] = lambda error: None

    # --- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        self._transport = transport
        self._open_links.add(self)
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self.remote = (transport.get_extra_info("peername") or ("", 0))[:2]
        sock = transport.get_extra_info("socket")
        # The kernel's queue counts as ours: what it has not sent yet can't be overtaken either.
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _HIGH_WATER_BYTES)
        self._handshake(b"")
        if self._on_made is not None:
            self._on_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        tls = self.tls
        data = self._buffer[:nbytes]
        if self._error is not None:
            return
        if not tls.is_open:
            self._handshake(data)
            data = self._buffer[:0]
            if not tls.is_open or self._error is not None:
                return
        try:
            plaintext = tls.decrypt(data)
        except PetalsError as error:
            self._lose(error)
            return
        if answer := tls.take_outgoing():
            self._send(answer)
        if not plaintext:
            return
        if self._on_data is not None:
            self._on_data(plaintext)
            return
        self._unread += plaintext
        if len(self._unread) > _MAX_UNREAD_BYTES and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def pause_writing(self) -> None:
        self.is_paused = self._is_full = True
        self._paused_at_s, self._passed_bytes = time.perf_counter(), self._count_passed()

    def resume_writing(self) -> None:
        self._is_full = False
        self.rate.note(self._count_passed() - self._passed_bytes, time.perf_counter() - self._paused_at_s)
        self._go_on()

    def eof_received(self) -> None:
        self._lose(PeerConnectionError(self._ending("closed the connection")))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._open_links.discard(self)
        if self._linger is not None:
            self._linger.cancel()
        if self._throttled is not None:
            self._throttled.cancel()
        reason = f"lost the connection: {_text(error)}" if error is not None else "closed the connection"
        self._lose(PeerConnectionError(self._ending(reason)))
        if not self._lost.done():
            self._lost.set_result(None)

    # --- called by the owner

    async def secured(self) -> None:
        """Wait for the end of the TLS handshake.

        Raises:
            PetalsError: what ``TlsChannel.handshake`` raises; ``PeerConnectionError`` when the connection is lost.
        """
        while not self.tls.is_open:
            await self._change()

    async def read(self) -> bytes:
        """Return what has arrived, at least one byte. Only before ``attach``, and for one caller at a time.

        Raises:
            PetalsError: the connection is lost.
        """
        while not self._unread:
            await self._change()
        content = bytes(self._unread)
        self._unread.clear()
        if self._transport is not None:
            self._transport.resume_reading()
        return content

    def attach(
        self,
        on_data: Callable[[bytes], None],
        on_writable: Callable[[], None],
        on_lost: Callable[[PetalsError], None],
    ) -> None:
        """Hand what arrives to ``on_data`` from now on, beginning with what has.

        ``on_writable`` is called when ``is_paused`` ends; ``on_lost`` once, when nothing more can be sent or received.
        """
        self._on_data, self._on_writable, self._on_lost = on_data, on_writable, on_lost
        if self._unread:
            content = bytes(self._unread)
            self._unread.clear()
            on_data(content)
        if self._error is not None:
            on_lost(self._error)
        elif self._transport is not None:
            self._transport.resume_reading()

    def write(self, buffers: Sequence[Buffer]) -> int:
        """Send buffers in one piece and return their bytes. A lost link drops them."""
        content = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        if self._error is None:
            self._send(self.tls.encrypt(content))
            if self._throttle is not None:
                self._wait(self._throttle.spend(len(content), now_s=self._loop.time()))
        return len(content)

    def finish(self, grace_s: float = _GRACE_S) -> None:
        """Close behind what was written, or with a reset when that takes longer than ``grace_s``. Idempotent."""
        if self._error is None:
            self._error = PeerConnectionError("the connection was closed on this side")
            self._wake()
        if self._transport is not None:
            self._transport.close()
            if self._linger is None:
                self._linger = self._loop.call_later(grace_s, self.abort)

    def abort(self) -> None:
        """Close at once; what was not sent is lost."""
        self.finish()
        if self._transport is not None:
            self._transport.abort()

    async def close(self, grace_s: float = _GRACE_S) -> None:
        """``finish``, and wait until the socket is closed."""
        self.finish(grace_s)
        if self._transport is not None:
            await asyncio.shield(self._lost)

    # --- inside

    def _handshake(self, data: Buffer) -> None:
        try:
            is_over = self.tls.handshake(data)
        except PetalsError as error:
            self._send(self.tls.take_outgoing())
            self._lose(error)
            return
        self._send(self.tls.take_outgoing())
        if is_over:
            self._wake()

    def _send(self, ciphertext: bytes) -> None:
        if ciphertext and self._transport is not None:
            self._transport.write(ciphertext)

    def _count_passed(self) -> int:
        """Bytes that have arrived at the other end or, where nobody can tell, that the kernel has taken: some of these
        at once, if its own queue was empty. Up to a number that stays the same."""
        if self._transport is None:
            return 0
        sock = self._transport.get_extra_info("socket")
        progress = read_progress(sock)
        if progress is None:
            return -self._transport.get_write_buffer_size()
        if self._pacing.note(
            num_resent=progress.num_resent,
            rtt_s=progress.rtt_s,
            least_rtt_s=progress.least_rtt_s,
            bytes_per_s=self.rate.bytes_per_s,
        ):
            send_at_rate(sock)
        return progress.num_arrived

    def _wait(self, delay_s: float) -> None:
        """Write nothing more for a while."""
        if delay_s > 0 and self._transport is not None:
            self.is_paused = True
            if self._throttled is not None:
                self._throttled.cancel()
            self._throttled = self._loop.call_later(delay_s, self._paid)

    def _paid(self) -> None:
        self._throttled = None
        self._go_on()

    def _go_on(self) -> None:
        if not self._is_full and self._throttled is None:
            self.is_paused = False
            self._on_writable()

    def _lose(self, error: PetalsError) -> None:
        if self._error is not None:
            return
        self._error = error
        self.finish()
        self._wake()
        self._on_lost(error)

    def _ending(self, what: str) -> str:
        return f"the other end {what}" + ("" if self.tls.is_open else " during the TLS handshake")

    async def _change(self) -> None:
        """Wait until something new has happened."""
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _text(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
