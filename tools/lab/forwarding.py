"""The lab without root: a TCP forwarder in this process that gives one connection a path's delays and rates.

Both directions pass the same machine as the packets of a lab (``lab.links``), in pieces of a stream. What TCP itself
would do on such a path is left out: its slow start, loss and retransmission. An outage holds bytes back until it is
over. The round trip that a connection's start takes is there: nothing passes before it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import selectors
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from lab.links import Network, Packet
from lab.settings import HostSettings, LabError

_DIALER, _TARGET = "dialer", "target"
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 1448, 65536
_PIECE_S = 1e-3
_UNBOUNDED_BYTES = 1 << 62


class Forwarder:
    """Listens, and forwards each connection to ``target`` as if both ends were hosts of a lab.

    An async context manager; leaving it closes every connection. On an event loop whose timers tick in milliseconds
    (asyncio's on Linux, uvloop) bytes may come up to 1 ms late; ``new_event_loop`` makes one that is exact.

    Raises:
        LabError: a host is to lose packets, which a stream can't.
    """

    def __init__(
        self,
        target: tuple[str, int],
        dialer: HostSettings,
        listener: HostSettings,
        *,
        listen: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        if dialer.loss or listener.loss:
            raise LabError("a forwarded connection can't lose packets, because it would lose its bytes: leave loss out")
        self.target = target
        self._listen = listen
        self._hosts = {_DIALER: dialer, _TARGET: listener}
        # The machine drops what doesn't fit and what meets an outage; here the reader waits instead.
        patient = {
            name: dataclasses.replace(settings, queue_bytes=_UNBOUNDED_BYTES, outages=())
            for name, settings in self._hosts.items()
        }
        self._network: Network[tuple[_End, bytes | None]] = Network(patient)
        self._start_s = time.monotonic()
        self._ends: set[_End] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._server: asyncio.Server | None = None
        self._all_closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._start_s = time.monotonic()
        self._server = await loop.create_server(lambda: _End(self, _DIALER), *self._listen)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._opening:
            task.cancel()
        if self._opening:
            await asyncio.wait(self._opening)
        if self._timer is not None:
            self._timer.cancel()
        for end in list(self._ends):
            end.peer = None  # nobody is told any more
            end.abort()
        if self._ends:  # a transport tells its end one turn of the loop later
            await self._all_closed.wait()

    @property
    def address(self) -> tuple[str, int]:
        """Where to connect to instead of ``target``."""
        if self._server is None:
            raise RuntimeError("the forwarder has not been started or is closed")
        return self._server.sockets[0].getsockname()[:2]

    @property
    def trip_s(self) -> float:
        """A round trip without any queue."""
        return 2 * sum(settings.delay_s for settings in self._hosts.values())

    def max_held_bytes(self, source: str) -> int:
        """What a direction takes in before it stops reading: what is on the way at its rate, and the queue's bound."""
        ends = (self._hosts[_DIALER], self._hosts[_TARGET])
        up, down = ends if source == _DIALER else reversed(ends)
        bits_per_s = min((rate for rate in (up.up_bits_per_s, down.down_bits_per_s) if rate), default=None)
        if bits_per_s is None:
            return _UNBOUNDED_BYTES
        return int(bits_per_s / 8 * self.trip_s / 2) + min(end.queue_limit_bytes(bits_per_s) for end in (up, down))

    def piece_bytes(self) -> int:
        """How a stream is cut: into what takes 1 ms at the lowest rate."""
        rates = [
            rate
            for end in self._hosts.values()
            for rate in (end.up_bits_per_s, end.down_bits_per_s)
            if rate is not None
        ]
        if not rates:
            return _MAX_PIECE_BYTES
        return max(_MIN_PIECE_BYTES, min(_MAX_PIECE_BYTES, int(min(rates) / 8 * _PIECE_S)))

    # --- what ends tell -----------------------------------------------------------------------------------------------

    def opened(self, end: _End) -> None:
        """A connection has been made; one that was accepted gets its other half after a round trip."""
        self._ends.add(end)
        self._all_closed.clear()
        if end.host == _DIALER:
            end.hold()
            task = asyncio.get_running_loop().create_task(self._open(end))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def closed(self, end: _End) -> None:
        """A connection has gone; the other half learns it when it has got everything before."""
        self._ends.discard(end)
        if not self._ends:
            self._all_closed.set()
        if end.peer is not None and end.peer in self._ends:
            self.send(end, None)

    def send(self, end: _End, data: bytes | None) -> None:
        """Put bytes on their way to an end's peer; ``None`` says that there are no more."""
        assert end.peer is not None
        now_s = time.monotonic()
        destination = _TARGET if end.host == _DIALER else _DIALER
        step = self.piece_bytes()
        for piece in [data[place : place + step] for place in range(0, len(data), step)] if data else [None]:
            size = len(piece or b"")
            packet = Packet(
                source=end.host, destination=destination, num_bytes=size, segment_bytes=size, content=(end.peer, piece)
            )
            dropped = self._network.send(now_s, packet)
            assert dropped is None, "a stream lost bytes"
        self._schedule()

    async def _open(self, end: _End) -> None:
        await asyncio.sleep(self.trip_s)
        try:
            _, other = await asyncio.get_running_loop().create_connection(lambda: _End(self, _TARGET), *self.target)
        except OSError:
            end.abort()
            return
        end.peer, other.peer = other, end
        if end not in self._ends:  # it left while we were connecting
            other.abort()
            return
        end.go_on()

    def _schedule(self) -> None:
        due_s = self._network.next_s
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due_s is None:
            return
        now_s = time.monotonic()
        due_s = max(due_s, now_s + self._outage_left_s(now_s))
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due_s - now_s), self._deliver)

    def _deliver(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        if self._outage_left_s(now_s) <= 0:
            for packet in self._network.arrivals(now_s):
                end, data = packet.content
                end.deliver(data)
        self._schedule()

    def _outage_left_s(self, now_s: float) -> float:
        """How long it is until both hosts are connected."""
        time_s = now_s - self._start_s
        ends_s = [
            outage.start_s + outage.duration_s
            for settings in self._hosts.values()
            for outage in settings.outages
            if outage.covers(time_s)
        ]
        return max(ends_s, default=time_s) - time_s


class _End(asyncio.Protocol):
    """One half of a forwarded connection."""

    def __init__(self, forwarder: Forwarder, host: str) -> None:
        self.host = host
        self.peer: _End | None = None
        self._forwarder = forwarder
        self._transport: asyncio.Transport | None = None
        self._held_bytes = 0
        """Read here and not yet written to the peer."""
        self._reasons_to_hold = 0
        self._is_full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._forwarder.opened(self)

    def data_received(self, data: bytes) -> None:
        self._held_bytes += len(data)
        self._forwarder.send(self, data)
        if not self._is_full and self._held_bytes >= self._forwarder.max_held_bytes(self.host):
            self._is_full = True
            self.hold()

    def eof_received(self) -> bool:
        self._forwarder.send(self, None)
        return True  # the other direction goes on

    def connection_lost(self, error: Exception | None) -> None:
        self._forwarder.closed(self)

    def pause_writing(self) -> None:
        if self.peer is not None:
            self.peer.hold()

    def resume_writing(self) -> None:
        if self.peer is not None:
            self.peer.go_on()

    def deliver(self, data: bytes | None) -> None:
        """Write what has come over the path."""
        assert self._transport is not None
        assert self.peer is not None
        if self._transport.is_closing():
            return
        if data is not None:
            self._transport.write(data)
            self.peer.delivered(len(data))
        elif self.peer.is_closed:
            self._transport.close()
        else:
            self._transport.write_eof()

    def delivered(self, num_bytes: int) -> None:
        """Take note that the peer has got bytes."""
        self._held_bytes -= num_bytes
        if self._is_full and self._held_bytes < self._forwarder.max_held_bytes(self.host):
            self._is_full = False
            self.go_on()

    @property
    def is_closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def hold(self) -> None:
        """Read no more; counts, so that every ``hold`` needs a ``go_on``."""
        self._reasons_to_hold += 1
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def go_on(self) -> None:
        """Undo one ``hold``."""
        self._reasons_to_hold -= 1
        if self._reasons_to_hold == 0 and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop with timers that tick in microseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def run(listen: str, target: str, hosts: Mapping[str, HostSettings], command: Sequence[str]) -> int:
    """Forward until ``command`` has ended, or until Ctrl-C if there is none; return an exit code.

    Raises:
        LabError: there are not two hosts, an address isn't one, or the port is taken.
    """
    if len(hosts) != 2:
        raise LabError("--forward needs two --hosts: the one who connects, and the target")
    dialer, listener = hosts.values()
    forwarder = Forwarder(parse_address(target), dialer, listener, listen=parse_address(listen))
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_forward(forwarder, command))


def parse_address(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT`` or a port of this machine.

    Raises:
        LabError: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise LabError(f"{text!r} is no address: write HOST:PORT")
    return host or "127.0.0.1", int(port)


async def _forward(forwarder: Forwarder, command: Sequence[str]) -> int:
    try:
        await forwarder.__aenter__()
    except OSError as error:
        raise LabError(f"can't listen: {error.strerror}") from error
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(forwarder)
        host, port = forwarder.address
        print(f"forwarding {host}:{port}", file=sys.stderr, flush=True)
        if not command:
            await asyncio.Event().wait()
        try:
            process = await asyncio.create_subprocess_exec(*command)
        except OSError as error:
            raise LabError(f"can't run {command[0]}: {error.strerror}") from error
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
                await process.wait()
    return code if code >= 0 else 128 - code
