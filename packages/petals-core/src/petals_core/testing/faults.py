"""A TCP proxy between two peers that breaks the connection in a planned way.

Faults strike at a byte of a direction, so a test needs no clock: it plans faults before it starts, or adds one between
two steps, which then strikes the next bytes that pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

from petals_core.addresses import Address
from petals_core.net.tasks import BackgroundTasks

_CHUNK_BYTES = 65536


class Direction(StrEnum):
    """Which way bytes flow through the proxy."""

    TO_LISTENER = "to_listener"
    TO_DIALER = "to_dialer"


class FaultKind(StrEnum):
    """What happens to the bytes behind the fault's place."""

    CUT = "cut"
    """Both sides of the connection are closed at once, with a reset."""
    HOLD = "hold"
    """They wait for ``FaultProxy.release``, and then pass in order."""
    DROP = "drop"
    """They vanish, for ever: a black hole, in which no end learns that the other has gone."""
    SKIP = "skip"
    """``num_bytes`` of them vanish, the others pass."""
    CORRUPT = "corrupt"
    """``num_bytes`` of them are inverted."""
    DUPLICATE = "duplicate"
    """``num_bytes`` of them pass twice."""
    SLOW = "slow"
    """They pass one by one, with other work of the loop between, ``num_bytes`` of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong once, on the first connection that reaches it."""

    kind: FaultKind
    direction: Direction
    after_bytes: int = 0
    """Bytes of this direction that pass unharmed first: of the whole connection where the fault was planned at the
    proxy's start, from now on where it was added later."""
    num_bytes: int = 64
    """At most so many bytes are harmed: fewer if fewer arrive together."""


class FaultProxy:
    """Listens on a loopback port of its own and forwards each connection to ``target``, with faults.

    An async context manager: leaving it closes every connection and waits for the proxy's tasks.
    """

    def __init__(self, target: Address, faults: Iterable[Fault] = ()) -> None:
        self.target = target
        self.num_connections = 0
        """Connections that were ever accepted."""
        self.passed_bytes = dict.fromkeys(Direction, 0)
        """Bytes forwarded so far, of all connections."""
        self.struck: list[Fault] = []
        """Faults that have happened, in order."""
        self._planned = list(faults)
        self._tasks = BackgroundTasks()
        self._flows: set[_Flow] = set()
        self._released = asyncio.Event()
        self._news = asyncio.Condition()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.refuse()
        self.cut()
        await self._tasks.close()

    @property
    def address(self) -> Address:
        """Where to connect to instead of ``target``."""
        if self._server is None:
            raise RuntimeError("the proxy has not been started or is closed")
        return Address("127.0.0.1", self._server.sockets[0].getsockname()[1])

    def add(self, fault: Fault) -> None:
        """Plan a fault on the connections that are open now (or the next, if none is), counted from this moment."""
        flows = [flow for flow in self._flows if flow.direction is fault.direction]
        for flow in flows:
            flow.plan(fault, flow.passed_bytes + fault.after_bytes)
        if not flows:
            self._planned.append(fault)

    def release(self) -> None:
        """Let what ``HOLD`` keeps back pass, now and later."""
        self._released.set()

    def cut(self) -> None:
        """Close all connections at once, with a reset."""
        for flow in list(self._flows):
            flow.reset()

    async def refuse(self) -> None:
        """Take no further connections; the port refuses them."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def until_struck(self, num_faults: int = 1) -> None:
        """Wait until so many faults have happened."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.struck) >= num_faults)

    async def until_passed(self, direction: Direction, num_bytes: int) -> None:
        """Wait until so many bytes have passed in a direction, of all connections together."""
        async with self._news:
            await self._news.wait_for(lambda: self.passed_bytes[direction] >= num_bytes)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            far_reader, far_writer = await self._tasks.start(
                asyncio.open_connection(self.target.host, self.target.port)
            )
        except BaseException as error:
            writer.transport.abort()
            if isinstance(error, OSError):
                return
            raise
        pair = [
            _Flow(self, Direction.TO_LISTENER, reader, far_writer),
            _Flow(self, Direction.TO_DIALER, far_reader, writer),
        ]
        for flow in pair:
            for fault in self._planned:
                if fault.direction is flow.direction:
                    flow.plan(fault, fault.after_bytes)
            self._flows.add(flow)
        for flow in pair:
            self._tasks.start(self._forward(flow, pair))

    async def _forward(self, flow: _Flow, pair: list[_Flow]) -> None:
        try:
            await flow.run(self._released)
        except (OSError, EOFError):
            pass
        finally:
            for each in pair:
                each.reset()
                self._flows.discard(each)

    async def report(self, flow: _Flow, num_bytes: int = 0, fault: Fault | None = None) -> None:
        """Count what a flow has done, and wake who waits for it."""
        self.passed_bytes[flow.direction] += num_bytes
        if fault is not None:
            self.struck.append(fault)
            if fault in self._planned:
                self._planned.remove(fault)
        async with self._news:
            self._news.notify_all()


class _Flow:
    """One direction of one connection."""

    def __init__(
        self,
        proxy: FaultProxy,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.direction = direction
        self.passed_bytes = 0
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._faults: list[tuple[int, Fault]] = []

    def plan(self, fault: Fault, at_byte: int) -> None:
        self._faults.append((at_byte, fault))
        self._faults.sort(key=lambda planned: planned[0])

    def reset(self) -> None:
        self._writer.transport.abort()

    async def run(self, released: asyncio.Event) -> None:
        """Forward until either end closes or a fault ends it."""
        while chunk := await self._reader.read(_CHUNK_BYTES):
            while chunk:
                if not self._faults:
                    await self._pass(chunk)
                    break
                place, fault = self._faults[0]
                healthy, chunk = chunk[: place - self.passed_bytes], chunk[max(0, place - self.passed_bytes) :]
                if place > self.passed_bytes:
                    await self._pass(healthy)
                if chunk:
                    del self._faults[0]
                    chunk = await self._strike(fault, chunk, released)
        # The end of the stream passes too, so that a half-closed connection stays one.
        self._writer.write_eof()
        await self._reader.read()

    async def _strike(self, fault: Fault, chunk: bytes, released: asyncio.Event) -> bytes:
        """Do a fault to the bytes at hand; return those that are left for later."""
        await self._proxy.report(self, fault=fault)
        kind = fault.kind
        if kind is FaultKind.CUT:
            raise EOFError
        if kind is FaultKind.HOLD:
            await released.wait()
            return chunk
        if kind is FaultKind.DROP:
            while await self._reader.read(_CHUNK_BYTES):
                pass
            await asyncio.Event().wait()  # the end vanishes too; ``reset`` of the other direction or close ends this
        harmed, rest = chunk[: fault.num_bytes], chunk[fault.num_bytes :]
        if kind is FaultKind.CORRUPT:
            await self._pass(bytes(byte ^ 0xFF for byte in harmed))
        elif kind is FaultKind.DUPLICATE:
            await self._pass(harmed)
            await self._pass(harmed)
        elif kind is FaultKind.SLOW:
            for number in range(len(harmed)):
                await self._pass(harmed[number : number + 1])
        else:
            assert kind is FaultKind.SKIP
        return rest

    async def _pass(self, chunk: bytes) -> None:
        self._writer.write(chunk)
        self.passed_bytes += len(chunk)
        await self._writer.drain()
        await self._proxy.report(self, len(chunk))
        await asyncio.sleep(0)
