"""The lab without root: streams pass whole, never early, and in bounded memory; ends and outages pass too."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from lab.forwarding import Forwarder, new_event_loop, parse_address
from lab.settings import HostSettings, LabError, Outage
from petals_core.testing.network import run_clean

T = TypeVar("T")
MBIT = 1e6
TOOL = Path(__file__).resolve().parents[2] / "tools" / "network_lab.py"


def run(main: Coroutine[Any, Any, T]) -> T:
    return run_clean(main, loop_factory=new_event_loop)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send everything back, also the end."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def start_echo() -> tuple[asyncio.Server, tuple[str, int]]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()


async def exchange(data: bytes, dialer: HostSettings, listener: HostSettings) -> tuple[bytes, float]:
    """Send through a forwarder to an echo and back; return what came and the seconds that it took."""
    server, target = await start_echo()
    async with server, Forwarder(target, dialer, listener) as forwarder:
        started_s = time.monotonic()
        reader, writer = await asyncio.open_connection(*forwarder.address)
        writer.write(data)
        writer.write_eof()
        echoed = await reader.read(-1)
        elapsed_s = time.monotonic() - started_s
        writer.close()
        await writer.wait_closed()
    return echoed, elapsed_s


def test_bytes_pass_both_ways_and_take_the_start_of_a_connection_and_a_round_trip() -> None:
    hosts = HostSettings(delay_s=0.005), HostSettings(delay_s=0.015)
    echoed, elapsed_s = run(exchange(b"hello", *hosts))
    assert echoed == b"hello"
    assert elapsed_s >= 2 * 0.040


def test_a_rate_takes_its_time_and_loses_nothing() -> None:
    data = bytes(range(256)) * 1000
    hosts = HostSettings(up_bits_per_s=40 * MBIT), HostSettings(up_bits_per_s=20 * MBIT, delay_s=0.001)
    echoed, elapsed_s = run(exchange(data, *hosts))
    assert echoed == data
    assert elapsed_s >= len(data) * 8 / (20 * MBIT)


def test_an_outage_holds_bytes_back_until_it_is_over() -> None:
    outage = Outage(start_s=0.0, duration_s=0.2)
    echoed, elapsed_s = run(exchange(b"hello", HostSettings(), HostSettings(outages=(outage,))))
    assert echoed == b"hello"
    assert elapsed_s >= 0.19


def test_a_sender_is_held_back_when_the_path_is_full() -> None:
    async def main() -> tuple[int, int]:
        forwarders: list[Forwarder] = []
        slow = HostSettings(down_bits_per_s=0.1 * MBIT, queue_bytes=20_000)
        server, target = await start_echo()
        async with server, Forwarder(target, HostSettings(), slow) as forwarder:
            forwarders.append(forwarder)
            _, writer = await asyncio.open_connection(*forwarder.address)
            writer.write(bytes(50_000_000))
            drained = asyncio.ensure_future(writer.drain())
            await asyncio.wait([drained], timeout=0.3)
            assert not drained.done()
            held = max(end._held_bytes for end in forwarder._ends)
            bound = forwarder.max_held_bytes("dialer")
            drained.cancel()
            writer.transport.abort()
        return held, bound

    held, bound = run(main())
    assert 20_000 <= bound <= held <= bound + 300_000, "at most one more read of the event loop"


def test_leaving_closes_connections_that_are_open_and_those_that_are_being_made() -> None:
    async def main() -> tuple[bytes, bytes]:
        server, target = await start_echo()
        async with server:
            async with Forwarder(target, HostSettings(delay_s=0.01), HostSettings()) as forwarder:
                reader, writer = await asyncio.open_connection(*forwarder.address)
                writer.write(b"x")
                await reader.readexactly(1)
                late_reader, late_writer = await asyncio.open_connection(*forwarder.address)
            ends = []
            for each_reader, each_writer in ((reader, writer), (late_reader, late_writer)):
                try:
                    ends.append(await each_reader.read())
                except ConnectionError:
                    ends.append(b"")
                each_writer.close()
        return ends[0], ends[1]

    assert run(main()) == (b"", b"")


def test_a_target_that_refuses_closes_the_connection() -> None:
    async def main() -> bytes:
        server, target = await start_echo()
        server.close()
        await server.wait_closed()
        async with Forwarder(target, HostSettings(), HostSettings()) as forwarder:
            reader, writer = await asyncio.open_connection(*forwarder.address)
            try:
                return await reader.read()
            except ConnectionError:
                return b""
            finally:
                writer.close()

    assert run(main()) == b""


def test_a_stream_can_lose_nothing() -> None:
    with pytest.raises(LabError, match="leave loss out"):
        Forwarder(("127.0.0.1", 1), HostSettings(loss=0.1), HostSettings())


@pytest.mark.parametrize(("text", "address"), [("80", ("127.0.0.1", 80)), ("a.b:1", ("a.b", 1))])
def test_addresses_are_read(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "a", "a:", "a:b", "1.2.3.4:99999"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(LabError):
        parse_address(text)


def test_the_command_forwards_while_a_command_runs() -> None:
    command = [sys.executable, str(TOOL), "--forward", "127.0.0.1:0", "127.0.0.1:1", "--hosts", "a:delay=1ms", "b"]
    done = subprocess.run([*command, "--", "sh", "-c", "exit 3"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("forwarding 127.0.0.1:")
