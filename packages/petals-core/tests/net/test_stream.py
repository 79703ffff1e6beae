"""Streams: order, ends, cancellation, lost peers, and small messages that overtake large ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from petals_core.errors import (
    CancelledByPeerError,
    DeadlineExceededError,
    DrainingError,
    FrameTooLargeError,
    InvalidRequestError,
    OverloadedError,
    PeerConnectionError,
)
from petals_core.limits import MIB, WireLimits
from petals_core.net.stream import EndOfStreamError, Stream
from petals_core.testing.faults import Direction, FaultProxy
from petals_core.testing.network import address_of, dialing, echo, serving
from petals_core.wire.frames import Priority
from petals_core.wire.messages import InfoRequest

Run = Callable[[Any], Any]
REQUEST = InfoRequest()


async def flood(stream: Stream, timeout_s: float | None) -> None:
    """Send until something prevents it."""
    while True:
        await stream.send(REQUEST, [bytes(32 * 1024)], timeout_s=timeout_s)


def test_messages_keep_their_order(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream(Priority.DECODE)
            for number in range(50):
                await stream.send(REQUEST, [b"%d" % number])
            replies = [bytes((await stream.receive(timeout_s=10)).received_payload) for _ in range(50)]
            assert replies == [b"%d" % number for number in range(50)]
            await stream.finish()
            with pytest.raises(EndOfStreamError):
                await stream.receive(timeout_s=10)
            assert not stream.is_open
            assert connection.num_streams == 0

    run(main())


def test_what_need_not_wait_is_sent_at_once_and_in_order(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream(Priority.DECODE)
            for number in range(5):
                assert stream.send_now(REQUEST, [b"%d" % number])
            replies = [bytes((await stream.receive(timeout_s=10)).received_payload) for _ in range(5)]
            assert replies == [b"%d" % number for number in range(5)]
            sending = asyncio.create_task(stream.send(REQUEST, [bytes(8 * MIB)]))
            await asyncio.sleep(0)
            assert not stream.send_now(REQUEST), "it would wait behind what is queued"
            sending.cancel()
            stream.cancel()
            with pytest.raises(CancelledByPeerError):
                stream.send_now(REQUEST)

    run(main())


def test_handler_sees_the_authenticated_peer_and_the_priority(run: Run) -> None:
    async def main() -> None:
        seen: list[Any] = []

        async def note(stream: Stream) -> None:
            seen.extend([stream.peer_id, stream.priority])

        async with serving(note) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream(Priority.BACKGROUND)
            await stream.send(REQUEST, end=True)
            with pytest.raises(EndOfStreamError):
                await stream.receive(timeout_s=10)
            assert connection.peer_id == stream.peer_id == listener.peer_id
            assert seen == [dialer.peer_id, Priority.BACKGROUND]

    run(main())


def test_decode_steps_overtake_a_large_message(run: Run) -> None:
    order: list[str] = []

    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            bulk, decode = connection.open_stream(Priority.BULK), connection.open_stream(Priority.DECODE)
            content = bytes(50 * MIB)

            async def transfer() -> None:
                await bulk.send(REQUEST, [content], end=True)
                order.append("sent")
                assert (await bulk.receive(timeout_s=60)).received_payload == content
                order.append("bulk")

            task = asyncio.create_task(transfer())
            await asyncio.sleep(0)
            for _ in range(5):
                await decode.send(REQUEST, [bytes(4096)])
                await decode.receive(timeout_s=60)
                order.append("decode")
            await decode.finish()
            await task

    run(main())
    assert order == ["decode"] * 5 + ["sent", "bulk"]


def test_sender_waits_while_nobody_receives(run: Run) -> None:
    limits = WireLimits(stream_credit_bytes=64 * 1024)

    async def main() -> None:
        go_on = asyncio.Event()

        async def lazy(stream: Stream) -> None:
            await go_on.wait()
            await echo(stream)

        async with serving(lazy, limits=limits) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            with pytest.raises(DeadlineExceededError):
                await flood(stream, timeout_s=0.05)
            other = connection.open_stream(Priority.DECODE)
            await other.send(REQUEST, [b"still works"])
            go_on.set()
            assert bytes((await other.receive(timeout_s=10)).received_payload) == b"still works"
            other.cancel()
            stream.cancel()

    run(main())


def test_too_large_a_message_is_refused_before_it_is_sent(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, limits=WireLimits(max_message_bytes=1 * MIB)) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            with pytest.raises(FrameTooLargeError):
                await stream.send(REQUEST, [bytes(2 * MIB)])
            await stream.send(REQUEST, [b"small"])
            await stream.receive(timeout_s=10)
            stream.cancel()

    run(main())


def test_cancel_by_the_client_cancels_the_handler(run: Run) -> None:
    async def main() -> None:
        outcome: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

        async def waiting(stream: Stream) -> None:
            try:
                await stream.receive(timeout_s=None)
                await stream.send(REQUEST)
                await stream.receive(timeout_s=None)
            except BaseException as error:
                outcome.set_result(error)
                raise

        async with serving(waiting) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            await stream.send(REQUEST)
            await stream.receive(timeout_s=10)
            stream.cancel()
            stream.cancel()
            assert isinstance(await outcome, asyncio.CancelledError)
            assert not stream.is_open
            with pytest.raises(CancelledByPeerError):
                await stream.receive(timeout_s=10)
            with pytest.raises(CancelledByPeerError):
                await stream.send(REQUEST)
            assert not connection.is_closed

    run(main())


def test_cancel_by_the_handler_is_raised_behind_its_messages(run: Run) -> None:
    async def cancelling(stream: Stream) -> None:
        await stream.receive(timeout_s=None)
        await stream.send(REQUEST, [b"first"])
        stream.cancel(InvalidRequestError("that is all"))

    async def main() -> None:
        async with serving(cancelling) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            await stream.send(REQUEST)
            assert bytes((await stream.receive(timeout_s=10)).received_payload) == b"first"
            for _ in range(2):
                with pytest.raises(InvalidRequestError, match="that is all"):
                    await stream.receive(timeout_s=10)
            with pytest.raises(InvalidRequestError, match="that is all"):
                await stream.send(REQUEST)

    run(main())


def test_handler_that_stops_early_stops_the_sender(run: Run) -> None:
    async def impatient(stream: Stream) -> None:
        await stream.receive(timeout_s=None)
        raise OverloadedError("no room")

    async def main() -> None:
        async with (
            serving(impatient, limits=WireLimits(stream_credit_bytes=64 * 1024)) as listener,
            dialing() as dialer,
        ):
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            with pytest.raises(OverloadedError):
                await flood(stream, timeout_s=30)

    run(main())


def test_deadline_of_receive_leaves_the_stream_usable(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            with pytest.raises(DeadlineExceededError):
                await stream.receive(timeout_s=0.01)
            await stream.send(REQUEST, [b"late"])
            assert bytes((await stream.receive(timeout_s=10)).received_payload) == b"late"
            stream.cancel()

    run(main())


def test_cancelled_receive_loses_no_message(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            receiving = asyncio.create_task(stream.receive(timeout_s=10))
            await asyncio.sleep(0)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            await stream.send(REQUEST, [b"kept"])
            assert bytes((await stream.receive(timeout_s=10)).received_payload) == b"kept"
            stream.cancel()

    run(main())


def test_vanished_server_wakes_everybody(run: Run) -> None:
    async def main() -> None:
        handlers: set[str] = set()
        both_run, both_over = asyncio.Event(), asyncio.Event()

        async def note(stream: Stream) -> None:
            name = bytes((await stream.receive(timeout_s=None)).received_payload).decode()
            handlers.add(name)
            if len(handlers) == 2:
                both_run.set()
            try:
                await asyncio.Event().wait()
            finally:
                handlers.discard(name)
                if not handlers:
                    both_over.set()

        async with (
            serving(note) as listener,
            FaultProxy(address_of(listener)) as proxy,
            dialing() as dialer,
        ):
            connection = await dialer.connect([proxy.address], peer_id=listener.peer_id)
            streams = [connection.open_stream() for _ in range(2)]
            for stream, name in zip(streams, [b"a", b"b"], strict=True):
                await stream.send(REQUEST, [name])
            await both_run.wait()
            waiting = [asyncio.create_task(stream.receive(timeout_s=None)) for stream in streams]
            await asyncio.sleep(0)
            proxy.cut()
            for task in waiting:
                with pytest.raises(PeerConnectionError, match=listener.peer_id.short):
                    await task
            await both_over.wait()
            assert connection.is_closed
            with pytest.raises(PeerConnectionError):
                await streams[0].send(REQUEST)
            with pytest.raises(PeerConnectionError):
                connection.open_stream()
            again = await dialer.connect([proxy.address], peer_id=listener.peer_id)
            assert again is not connection

    run(main())


def test_lost_peer_wakes_a_sender_that_waits_for_credit(run: Run) -> None:
    async def never(stream: Stream) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with (
            serving(never) as listener,
            FaultProxy(address_of(listener)) as proxy,
            dialing() as dialer,
        ):
            connection = await dialer.connect([proxy.address], peer_id=listener.peer_id)
            stream = connection.open_stream()
            task = asyncio.create_task(flood(stream, timeout_s=None))
            await proxy.until_passed(Direction.TO_LISTENER, 2 * MIB)
            proxy.cut()
            with pytest.raises(PeerConnectionError):
                await task

    run(main())


def test_draining_peer_takes_no_new_streams_and_finishes_the_open_ones(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream()
            await stream.send(REQUEST, [b"before"])
            await stream.receive(timeout_s=10)
            await listener.drain()
            await stream.send(REQUEST, [b"after"])
            assert bytes((await stream.receive(timeout_s=10)).received_payload) == b"after"
            assert connection.is_draining
            with pytest.raises(DrainingError):
                connection.open_stream()
            stream.cancel()

    run(main())
