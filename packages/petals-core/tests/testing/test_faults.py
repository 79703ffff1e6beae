"""The proxy does to the bytes exactly what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from petals_core.addresses import Address
from petals_core.testing.faults import Direction, Fault, FaultKind, FaultProxy
from petals_core.testing.network import run_clean


@asynccontextmanager
async def echoing() -> AsyncIterator[Address]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(100):
                writer.write(chunk)
        except OSError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


async def echoed(proxy: FaultProxy, content: bytes, num_bytes: int) -> bytes:
    reader, writer = await asyncio.open_connection(proxy.address.host, proxy.address.port)
    try:
        writer.write(content)
        return await reader.readexactly(num_bytes)
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (FaultKind.CORRUPT, b"ab\x9c\x9befgh"),
        (FaultKind.DUPLICATE, b"abcdcdefgh"),
        (FaultKind.SKIP, b"abefgh"),
        (FaultKind.SLOW, b"abcdefgh"),
    ],
)
def test_bytes_are_changed_where_planned(kind: FaultKind, expected: bytes, direction: Direction) -> None:
    async def main() -> None:
        fault = Fault(kind=kind, direction=direction, after_bytes=2, num_bytes=2)
        async with echoing() as target, FaultProxy(target, [fault]) as proxy:
            assert await echoed(proxy, b"abcdefgh", len(expected)) == expected
            assert proxy.struck == [fault]
            assert await echoed(proxy, b"abcdefgh", 8) == b"abcdefgh", "a fault happens once"

    run_clean(main())


@pytest.mark.parametrize("direction", list(Direction))
def test_cut_resets_both_ends(direction: Direction) -> None:
    async def main() -> None:
        fault = Fault(kind=FaultKind.CUT, direction=direction, after_bytes=3)
        async with echoing() as target, FaultProxy(target, [fault]) as proxy:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await echoed(proxy, b"abcdefgh", 8)

    run_clean(main())


def test_held_bytes_pass_when_released() -> None:
    async def main() -> None:
        async with (
            echoing() as target,
            FaultProxy(target, [Fault(kind=FaultKind.HOLD, direction=Direction.TO_DIALER, after_bytes=3)]) as proxy,
        ):
            task = asyncio.create_task(echoed(proxy, b"abcdefgh", 8))
            await proxy.until_struck()
            assert proxy.passed_bytes[Direction.TO_DIALER] == 3
            assert not task.done()
            proxy.release()
            assert await task == b"abcdefgh"

    run_clean(main())


def test_dropped_bytes_never_come() -> None:
    async def main() -> None:
        async with (
            echoing() as target,
            FaultProxy(target, [Fault(kind=FaultKind.DROP, direction=Direction.TO_LISTENER)]) as proxy,
        ):
            task = asyncio.create_task(echoed(proxy, b"abcdefgh", 1))
            await proxy.until_struck()
            assert proxy.passed_bytes[Direction.TO_LISTENER] == 0
            proxy.cut()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await task

    run_clean(main())


def test_later_fault_counts_from_now() -> None:
    async def main() -> None:
        async with echoing() as target, FaultProxy(target) as proxy:
            reader, writer = await asyncio.open_connection(proxy.address.host, proxy.address.port)
            writer.write(b"healthy")
            await reader.readexactly(7)
            proxy.add(Fault(kind=FaultKind.SKIP, direction=Direction.TO_DIALER, after_bytes=1, num_bytes=1))
            writer.write(b"abc")
            assert await reader.readexactly(2) == b"ac"
            writer.transport.abort()

    run_clean(main())


def test_refusing_proxy() -> None:
    async def main() -> None:
        async with echoing() as target, FaultProxy(target) as proxy:
            address = proxy.address
            await proxy.refuse()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(address.host, address.port)

    run_clean(main())
