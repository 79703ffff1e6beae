"""Connecting: one connection to a peer, shared attempts, several addresses, and clear errors."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from petals_core.addresses import Address
from petals_core.errors import (
    AuthenticationError,
    PeerConnectionError,
    PetalsError,
    ProtocolError,
    VersionMismatchError,
)
from petals_core.identity import Identity
from petals_core.limits import WireLimits
from petals_core.net import rpc
from petals_core.net.tls import TlsChannel, listener_context
from petals_core.testing.faults import Direction, Fault, FaultKind, FaultProxy
from petals_core.testing.network import address_of, dialing, echo, serving
from petals_core.wire.messages import InfoRequest

Run = Callable[[Any], Any]
REQUEST = InfoRequest()


@asynccontextmanager
async def speaking(reply: bytes, context: ssl.SSLContext | None = None) -> AsyncIterator[Address]:
    """A TCP (or TLS) server that says ``reply`` to whoever connects."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(reply)
            await reader.read()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


async def closed_port() -> Address:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    server.close()
    await server.wait_closed()
    return address


def test_idle_connections_are_closed_where_there_are_too_many_and_others_dropped_on_request(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as one, serving(echo) as two, serving(echo) as three, dialing() as dialer:
            first, second, third = [
                await dialer.connect([address_of(each)], peer_id=each.peer_id) for each in (one, two, three)
            ]
            stream = first.open_stream()
            dialer.drop_idle(3)
            dialer.drop_idle(2)
            assert await dialer.connect([address_of(one)], peer_id=one.peer_id) is first
            assert await dialer.connect([address_of(three)], peer_id=three.peer_id) is third
            assert await dialer.connect([address_of(two)], peer_id=two.peer_id) is not second
            dialer.drop(first)
            with pytest.raises(PeerConnectionError, match="silent"):
                await stream.receive(timeout_s=10)
            assert await dialer.connect([address_of(one)], peer_id=one.peer_id) is not first

    run(main())


def test_connection_is_kept_and_shared(run: Run) -> None:
    async def main() -> None:
        async with (
            serving(echo) as listener,
            FaultProxy(address_of(listener)) as proxy,
            dialing() as dialer,
        ):
            connections = await asyncio.gather(
                *(dialer.connect([proxy.address], peer_id=listener.peer_id) for _ in range(20))
            )
            connections.append(await dialer.connect([proxy.address], peer_id=listener.peer_id))
            connections.append(await dialer.connect([proxy.address], peer_id=None))
            assert len(set(connections)) == 1
            assert proxy.num_connections == 1

    run(main())


def test_address_alone_tells_the_peer(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=None)
            assert connection.peer_id == listener.peer_id
            assert connection.address == address_of(listener)
            assert 0 < connection.rtt_s < 10
            assert await dialer.connect([address_of(listener)], peer_id=listener.peer_id) is connection

    run(main())


def test_name_is_looked_up(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener, "localhost")], peer_id=listener.peer_id)
            assert connection.address.host == "localhost"

    run(main())


def test_two_ways_to_one_peer_give_one_connection(run: Run) -> None:
    async def main() -> None:
        async with (
            serving(echo) as listener,
            FaultProxy(address_of(listener)) as proxy,
            dialing() as dialer,
        ):
            first, second = await asyncio.gather(
                dialer.connect([address_of(listener)], peer_id=None),
                dialer.connect([proxy.address], peer_id=None),
            )
            assert first is second

    run(main())


def test_lost_connection_is_made_again(run: Run) -> None:
    async def main() -> None:
        async with (
            serving(echo) as listener,
            FaultProxy(address_of(listener)) as proxy,
            dialing() as dialer,
        ):
            connection = await dialer.connect([proxy.address], peer_id=listener.peer_id)
            stream = connection.open_stream()
            proxy.cut()
            with pytest.raises(PeerConnectionError):
                await stream.receive(timeout_s=10)
            again = await dialer.connect([proxy.address], peer_id=listener.peer_id)
            await rpc.call(again, REQUEST, reply=InfoRequest, timeout_s=10)
            assert proxy.num_connections == 2

    run(main())


def test_cancelled_waiter_does_not_end_the_attempt_of_others(run: Run) -> None:
    async def main() -> None:
        hold = Fault(kind=FaultKind.HOLD, direction=Direction.TO_DIALER)
        async with (
            serving(echo) as listener,
            FaultProxy(address_of(listener), [hold]) as proxy,
            dialing() as dialer,
        ):
            waiters = [asyncio.create_task(dialer.connect([proxy.address], peer_id=listener.peer_id)) for _ in range(3)]
            await proxy.until_struck()
            waiters[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiters[0]
            proxy.release()
            assert await waiters[1] is await waiters[2]
            assert proxy.num_connections == 1

    run(main())


def test_close_ends_attempts(run: Run) -> None:
    async def main() -> None:
        hold = Fault(kind=FaultKind.HOLD, direction=Direction.TO_DIALER)
        async with (
            serving(echo) as listener,
            FaultProxy(address_of(listener), [hold]) as proxy,
            dialing() as dialer,
        ):
            waiter = asyncio.create_task(dialer.connect([proxy.address], peer_id=listener.peer_id))
            await proxy.until_struck()
            await dialer.close()
            with pytest.raises(PeerConnectionError, match="closed"):
                await waiter
            with pytest.raises(PeerConnectionError, match="closed"):
                await dialer.connect([proxy.address], peer_id=listener.peer_id)

    run(main())


def test_other_identity_is_refused(run: Run) -> None:
    expected = Identity.ephemeral().peer_id

    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            with pytest.raises(AuthenticationError, match=f"{listener.peer_id.short}.*{expected.short}"):
                await dialer.connect([address_of(listener)], peer_id=expected)
            assert listener.num_connections == 0

    run(main())


def test_address_of_another_peer_does_not_keep_from_the_right_one(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as other, serving(echo) as listener, dialing() as dialer:
            addresses = [await closed_port(), address_of(other), address_of(listener)]
            connection = await dialer.connect(addresses, peer_id=listener.peer_id)
            assert connection.address == address_of(listener)

    run(main())


def test_silent_address_does_not_keep_from_the_next(run: Run) -> None:
    async def main() -> None:
        hold = Fault(kind=FaultKind.HOLD, direction=Direction.TO_DIALER)
        async with (
            serving(echo) as listener,
            FaultProxy(address_of(listener), [hold]) as proxy,
            dialing() as dialer,
        ):
            connection = await dialer.connect([proxy.address, address_of(listener)], peer_id=listener.peer_id)
            assert connection.address == address_of(listener)

    run(main())


def test_refused_connection_is_named(run: Run) -> None:
    async def main() -> None:
        address = await closed_port()
        async with dialing() as dialer:
            with pytest.raises(PeerConnectionError, match=f"{address}: connection refused"):
                await dialer.connect([address], peer_id=None)
            with pytest.raises(PeerConnectionError, match=f"{address}: connection refused.*; {address}"):
                await dialer.connect([address, address], peer_id=None)
            with pytest.raises(PeerConnectionError, match="no address"):
                await dialer.connect([], peer_id=None)

    run(main())


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.9\r\n", b"\0" * 64])
def test_other_protocols_are_named(run: Run, reply: bytes) -> None:
    async def main() -> None:
        async with speaking(reply) as address, dialing() as dialer:
            with pytest.raises(ProtocolError, match=f"{address}: .*does not speak"):
                await dialer.connect([address], peer_id=None)

    run(main())


def test_server_that_says_nothing_is_given_up(run: Run) -> None:
    async def main() -> None:
        async with speaking(b"") as address, dialing(connect_timeout_s=0.05) as dialer:
            with pytest.raises(PeerConnectionError, match=f"{address}: accepted the connection but"):
                await dialer.connect([address], peer_id=None)

    run(main())


def test_old_tls_is_a_version_mismatch(run: Run) -> None:
    context = listener_context(Identity.ephemeral())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    async def alert(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = TlsChannel(context, is_listener=True)
        with pytest.raises(ProtocolError):
            channel.handshake(await reader.read(65536))
        writer.write(channel.take_outgoing())
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(alert, "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        async with dialing() as dialer:
            with pytest.raises(VersionMismatchError, match=r"TLS 1\.3"):
                await dialer.connect([address], peer_id=None)
        server.close()

    run(main())


def test_other_tls_server_is_a_version_mismatch(run: Run) -> None:
    context = listener_context(Identity.ephemeral())
    context.set_alpn_protocols(["h2", "http/1.1"])

    async def main() -> None:
        async with speaking(b"", context) as address, dialing() as dialer:
            with pytest.raises(VersionMismatchError, match="petals/1"):
                await dialer.connect([address], peer_id=None)

    run(main())


def test_peer_that_speaks_tls_and_then_something_else_is_refused(run: Run) -> None:
    async def main() -> None:
        async with speaking(b"\0" * 100, listener_context(Identity.ephemeral())) as address, dialing() as dialer:
            with pytest.raises(PetalsError, match=str(address)) as caught:
                await dialer.connect([address], peer_id=None)
            assert isinstance(caught.value, ProtocolError)

    run(main())


def test_silence_is_answered_by_pings(run: Run) -> None:
    limits = WireLimits(ping_interval_s=0.01, idle_timeout_s=30)

    async def main() -> None:
        async with (
            serving(echo) as listener,
            FaultProxy(address_of(listener)) as proxy,
            dialing(limits=limits) as dialer,
        ):
            connection = await dialer.connect([proxy.address], peer_id=listener.peer_id)
            before, rtt_s = proxy.passed_bytes[Direction.TO_DIALER], connection.rtt_s
            await proxy.until_passed(Direction.TO_DIALER, before + 100)
            await rpc.call(connection, REQUEST, reply=InfoRequest, timeout_s=10)
            assert connection.rtt_s != rtt_s
            assert not connection.is_closed

    run(main())
