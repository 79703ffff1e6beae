"""What a listener admits, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from petals_core.addresses import Address
from petals_core.errors import (
    AuthenticationError,
    ConfigurationError,
    DeadlineExceededError,
    DrainingError,
    OverloadedError,
    PeerConnectionError,
)
from petals_core.identity import Identity
from petals_core.limits import MIB, ListenerLimits, WireLimits
from petals_core.net import rpc
from petals_core.net.listener import Listener
from petals_core.net.stream import Stream
from petals_core.net.tls import TlsChannel, dialer_context
from petals_core.swarm_key import SwarmKey
from petals_core.testing.faults import Direction, Fault, FaultKind, FaultProxy
from petals_core.testing.network import address_of, dialing, echo, run_clean, serving
from petals_core.wire.messages import InfoRequest

Run = Callable[[Any], Any]
REQUEST = InfoRequest()


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """What still comes before the other end closes the connection, in order or with a reset."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def dial_tls(listener: Listener) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, TlsChannel]:
    """Connect and go through TLS, but not through the hello."""
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    channel = TlsChannel(dialer_context(), is_listener=False)
    channel.handshake()
    writer.write(channel.take_outgoing())
    while not channel.is_open:
        received = await reader.read(65536)
        assert received, "the listener closed the connection"
        channel.handshake(received)
    writer.write(channel.take_outgoing())
    return reader, writer, channel


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_listens_on_one_address(run: Run, host: str) -> None:
    async def main() -> None:
        async with serving(echo, host=host) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener, host)], peer_id=listener.peer_id)
            await rpc.call(connection, REQUEST, reply=InfoRequest, timeout_s=10)

    run(main())


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the system has no dual-stack sockets")
def test_unspecified_ipv6_address_takes_both_families(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, host="::") as listener:
            for host in ("127.0.0.1", "::1"):
                async with dialing() as dialer:
                    await dialer.connect([address_of(listener, host)], peer_id=listener.peer_id)

    run(main())


def test_unspecified_ipv4_address_takes_ipv4_alone(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, host="0.0.0.0") as listener, dialing() as dialer:
            with pytest.raises(PeerConnectionError, match="refused"):
                await dialer.connect([address_of(listener, "::1")], peer_id=listener.peer_id)
            await dialer.connect([address_of(listener)], peer_id=listener.peer_id)

    run(main())


def test_socket_of_the_caller_is_used(run: Run) -> None:
    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        listener = await Listener.start(identity=Identity.ephemeral(), handler=echo, sock=sock)
        assert listener.port == port
        async with dialing() as dialer:
            await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            await listener.close()

    run(main())


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("203.0.113.77", 0)])
def test_impossible_place_is_a_configuration_error(run: Run, host: str, port: int) -> None:
    async def main() -> None:
        with pytest.raises(ConfigurationError, match="can't listen"):
            await Listener.start(identity=Identity.ephemeral(), handler=echo, host=host, port=port)

    run(main())


def test_used_port_is_a_configuration_error(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener:
            with pytest.raises(ConfigurationError, match=f"port {listener.port}"):
                await Listener.start(identity=Identity.ephemeral(), handler=echo, host="127.0.0.1", port=listener.port)

    run(main())


@pytest.mark.parametrize("has_listener_key", [True, False])
@pytest.mark.parametrize("has_dialer_key", [True, False])
def test_swarm_keys_must_agree(run: Run, has_listener_key: bool, has_dialer_key: bool) -> None:
    listener_key = SwarmKey(bytes(32)) if has_listener_key else None
    dialer_key = SwarmKey(bytes(32)) if has_dialer_key else None

    async def main() -> None:
        async with serving(echo, swarm_key=listener_key) as listener, dialing(swarm_key=dialer_key) as dialer:
            if listener_key == dialer_key:
                connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
                await rpc.call(connection, REQUEST, reply=InfoRequest, timeout_s=10)
            else:
                with pytest.raises(AuthenticationError, match=str(listener.port)):
                    await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
                assert listener.num_connections == 0

    run(main())


def test_wrong_swarm_key_is_refused(run: Run) -> None:
    async def main() -> None:
        async with (
            serving(echo, swarm_key=SwarmKey(bytes(32))) as listener,
            dialing(swarm_key=SwarmKey(b"x" * 32)) as dialer,
        ):
            with pytest.raises(AuthenticationError):
                await dialer.connect([address_of(listener)], peer_id=listener.peer_id)

    run(main())


def test_connections_of_one_peer_are_limited(run: Run) -> None:
    identity = Identity.ephemeral()

    async def main() -> None:
        async with (
            serving(echo, listener_limits=ListenerLimits(max_connections_per_peer=1)) as listener,
            dialing(identity=identity) as first,
            dialing(identity=identity) as second,
            dialing() as other,
        ):
            connection = await first.connect([address_of(listener)], peer_id=listener.peer_id)
            with pytest.raises(OverloadedError, match="this peer") as caught:
                await second.connect([address_of(listener)], peer_id=listener.peer_id)
            assert caught.value.retry_after_s is not None
            await other.connect([address_of(listener)], peer_id=listener.peer_id)
            await rpc.call(connection, REQUEST, reply=InfoRequest, timeout_s=10)

    run(main())


def test_all_connections_are_limited(run: Run) -> None:
    async def main() -> None:
        async with (
            serving(echo, listener_limits=ListenerLimits(max_connections=1)) as listener,
            dialing() as first,
            dialing() as second,
        ):
            connection = await first.connect([address_of(listener)], peer_id=listener.peer_id)
            with pytest.raises(OverloadedError, match="too many connections"):
                await second.connect([address_of(listener)], peer_id=listener.peer_id)
            await rpc.call(connection, REQUEST, reply=InfoRequest, timeout_s=10)

    run(main())


@pytest.mark.parametrize("limits", [ListenerLimits(max_handshakes=2), ListenerLimits(max_handshakes_per_source=2)])
def test_handshakes_are_limited(run: Run, limits: ListenerLimits) -> None:
    async def main() -> None:
        async with serving(echo, listener_limits=limits) as listener:
            idle = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(2)]
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            assert await read_to_end(reader) == b""
            writer.close()
            for _, each in idle:
                each.close()

    run(main())


def test_finished_and_failed_handshakes_make_room(run: Run) -> None:
    limits = ListenerLimits(max_handshakes=1, max_handshakes_per_source=1)

    async def main() -> None:
        async with serving(echo, listener_limits=limits) as listener, dialing() as first, dialing() as second:
            await first.connect([address_of(listener)], peer_id=listener.peer_id)
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(b"garbage")
            await read_to_end(reader)
            writer.close()
            await second.connect([address_of(listener)], peer_id=listener.peer_id)

    run(main())


def test_slow_handshake_is_dropped(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, limits=WireLimits(handshake_timeout_s=0.05)) as listener:
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(b"\x16\x03\x01")
            assert await read_to_end(reader) == b""
            writer.close()

    run(main())


def test_client_that_stops_behind_tls_is_dropped(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, limits=WireLimits(handshake_timeout_s=0.5)) as listener:
            reader, writer, _ = await dial_tls(listener)
            await read_to_end(reader)
            writer.close()
            assert listener.num_connections == 0

    run(main())


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 2000, b"\x16\x03\x01\x00\x05hello"])
def test_garbage_is_dropped(run: Run, garbage: bytes) -> None:
    async def main() -> None:
        async with serving(echo) as listener:
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(garbage)
            await read_to_end(reader)
            writer.close()
            async with dialing() as dialer:
                await dialer.connect([address_of(listener)], peer_id=listener.peer_id)

    run(main())


@pytest.mark.parametrize("garbage", [b"\0" * 20_000, b"\x89petals\n" + b"\xff" * 500])
def test_garbage_within_tls_is_dropped(run: Run, garbage: bytes) -> None:
    async def main() -> None:
        async with serving(echo) as listener:
            reader, writer, channel = await dial_tls(listener)
            writer.write(channel.encrypt(garbage))
            await read_to_end(reader)
            writer.close()
            assert listener.num_connections == 0

    run(main())


def test_draining_listener_refuses_connections(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            await listener.drain()
            with pytest.raises(DrainingError):
                await dialer.connect([address_of(listener)], peer_id=listener.peer_id)

    run(main())


def test_close_waits_for_open_streams(run: Run) -> None:
    async def main() -> None:
        listener = await Listener.start(identity=Identity.ephemeral(), handler=echo, host="127.0.0.1")
        async with dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            await stream.send(REQUEST)
            await stream.receive(timeout_s=10)
            closing = asyncio.create_task(listener.close(grace_s=30))
            await stream.send(REQUEST, [b"last"])
            assert bytes((await stream.receive(timeout_s=10)).received_payload) == b"last"
            assert not closing.done()
            await stream.finish()
            await closing

    run(main())


def test_close_does_not_wait_for_a_peer_that_takes_nothing() -> None:
    async def main() -> None:
        stuck = asyncio.Event()

        async def talk(stream: Stream) -> None:
            await stream.receive(timeout_s=None)
            with pytest.raises(DeadlineExceededError):
                await stream.send(REQUEST, [bytes(64 * MIB)], timeout_s=0.5)
            stuck.set()

        async with serving(talk) as listener, FaultProxy(address_of(listener)) as proxy, dialing() as dialer:
            connection = await dialer.connect([proxy.address], peer_id=listener.peer_id)
            proxy.add(Fault(kind=FaultKind.HOLD, direction=Direction.TO_DIALER))
            stream = connection.open_stream()
            await stream.send(REQUEST)
            await stuck.wait()
            await listener.close()
            stream.cancel()

    run_clean(main())


def test_close_cancels_handlers_and_tells_peers(run: Run) -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def stuck(stream: Stream) -> None:
            started.set()
            await asyncio.Event().wait()

        listener = await Listener.start(identity=Identity.ephemeral(), handler=stuck, host="127.0.0.1")
        async with dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            await stream.send(REQUEST)
            await started.wait()
            await listener.close()
            await listener.close()
            assert listener.num_connections == listener.num_streams == 0
            with pytest.raises(DrainingError):
                await stream.receive(timeout_s=10)
            with pytest.raises(PeerConnectionError, match="refused"):
                await dialer.connect([Address("127.0.0.1", listener.port)], peer_id=listener.peer_id)

    run(main())


def test_failing_handler_is_logged_and_hurts_no_other(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def handler(stream: Stream) -> None:
            message = await stream.receive(timeout_s=None)
            if message.received_payload == b"fail":
                raise KeyError("broken")
            await stream.send(message.body, end=True)

        async with serving(handler) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            bad, good = connection.open_stream(), connection.open_stream()
            await bad.send(REQUEST, [b"fail"], end=True)
            await good.send(REQUEST, end=True)
            await good.receive(timeout_s=10)
            with pytest.raises(Exception, match="internal error"):
                await bad.receive(timeout_s=10)
        assert "KeyError: 'broken'" in caplog.text

    run(main())
