"""One request, one reply."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from petals_core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    PeerConnectionError,
    PetalsError,
    ProtocolError,
    RemoteFailureError,
)
from petals_core.limits import MIB, WireLimits
from petals_core.net import rpc
from petals_core.net.stream import Stream
from petals_core.testing.network import address_of, dialing, echo, serving
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Info, InfoRequest

Run = Callable[[Any], Any]


def test_reply_comes_with_its_payload(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            message = await rpc.call(connection, InfoRequest(), [b"two ", b"parts"], reply=InfoRequest, timeout_s=10)
            assert bytes(message.received_payload) == b"two parts"
            assert connection.num_streams == 0

    run(main())


def test_many_calls_share_one_connection(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:

            async def one(number: int) -> bytes:
                connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
                message = await rpc.call(connection, InfoRequest(), [b"%d" % number], reply=InfoRequest, timeout_s=30)
                return bytes(message.received_payload)

            replies = await asyncio.gather(*(one(number) for number in range(100)))
            assert replies == [b"%d" % number for number in range(100)]
            assert listener.num_connections == 1

    run(main())


def test_more_calls_than_the_peer_takes_at_once_are_refused(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, limits=WireLimits(max_streams=2)) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            streams = [connection.open_stream() for _ in range(2)]
            with pytest.raises(OverloadedError):
                await rpc.call(connection, InfoRequest(), reply=InfoRequest, timeout_s=10)
            for stream in streams:
                stream.cancel()
            await rpc.call(connection, InfoRequest(), reply=InfoRequest, timeout_s=10)

    run(main())


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (InvalidRequestError("no such block"), InvalidRequestError),
        (OverloadedError("full", retry_after_s=2.5), OverloadedError),
        (ValueError("a secret of the server"), RemoteFailureError),
    ],
)
def test_error_of_the_handler_reaches_the_caller(run: Run, raised: Exception, expected: type[Exception]) -> None:
    async def failing(stream: Stream) -> None:
        await stream.receive(timeout_s=10)
        raise raised

    async def main() -> None:
        async with serving(failing) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            with pytest.raises(expected) as caught:
                await rpc.call(connection, InfoRequest(), reply=Info, timeout_s=10)
            assert type(caught.value) is expected
            assert "secret" not in str(caught.value)
            assert getattr(caught.value, "retry_after_s", None) == getattr(raised, "retry_after_s", None)
            assert not connection.is_closed

    run(main())


def test_failure_message_is_raised(run: Run) -> None:
    async def failing(stream: Stream) -> None:
        await stream.receive(timeout_s=10)
        await stream.fail(OverloadedError("full", retry_after_s=1.0))

    async def main() -> None:
        async with serving(failing) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            with pytest.raises(OverloadedError, match="full"):
                await rpc.call(connection, InfoRequest(), reply=Info, timeout_s=10)

    run(main())


def test_another_kind_of_reply_is_a_protocol_error(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            with pytest.raises(ProtocolError, match="InfoRequest, expected Info"):
                await rpc.call(connection, InfoRequest(), reply=Info, timeout_s=10)

    run(main())


def test_no_reply_is_a_protocol_error(run: Run) -> None:
    async def silent(stream: Stream) -> None:
        await stream.receive(timeout_s=10)

    async def main() -> None:
        async with serving(silent) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            with pytest.raises(ProtocolError, match="without an answer"):
                await rpc.call(connection, InfoRequest(), reply=Info, timeout_s=10)

    run(main())


def test_deadline_cancels_the_handler(run: Run) -> None:
    async def main() -> None:
        cancelled = asyncio.Event()

        async def stuck(stream: Stream) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with serving(stuck) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            with pytest.raises(DeadlineExceededError):
                await rpc.call(connection, InfoRequest(), reply=Info, timeout_s=0.01)
            await cancelled.wait()
            assert not connection.is_closed
            assert connection.num_streams == 0

    run(main())


def test_cancelled_caller_cancels_the_handler(run: Run) -> None:
    async def main() -> None:
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def stuck(stream: Stream) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with serving(stuck) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            task = asyncio.create_task(rpc.call(connection, InfoRequest(), reply=Info, timeout_s=10))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await cancelled.wait()

    run(main())


def test_call_on_a_closed_connection_fails_at_once(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            await connection.close()
            with pytest.raises(PeerConnectionError):
                await rpc.call(connection, InfoRequest(), reply=Info, timeout_s=10)

    run(main())


def test_connection_survives_calls_that_end_in_every_way(run: Run) -> None:
    """Cancelled, late, failed and finished calls together, under little credit, leave no stream and all credit."""
    limits = WireLimits(stream_credit_bytes=64 * 1024, connection_credit_bytes=256 * 1024)
    random = Random(1)

    async def moody(stream: Stream) -> None:
        message = await stream.receive(timeout_s=None)
        mood = random.random()
        if mood < 0.1:
            raise OverloadedError("not now")
        if mood > 0.2:
            await stream.send(message.body, message.payload)

    async def main() -> None:
        async with serving(moody, limits=limits) as listener, dialing(limits=limits) as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)

            async def one() -> None:
                for _ in range(10):
                    call = asyncio.create_task(
                        rpc.call(
                            connection,
                            InfoRequest(),
                            [bytes(random.choice([10, 4096, 200_000]))],
                            reply=InfoRequest,
                            priority=random.choice(list(Priority)),
                            timeout_s=random.choice([0.0, 0.001, 30.0]),
                        )
                    )
                    if random.random() < 0.2:
                        await asyncio.sleep(0)
                        call.cancel()
                    await asyncio.wait([call])
                    if not call.cancelled():
                        assert isinstance(call.exception(), PetalsError | None)

            await asyncio.gather(*(one() for _ in range(20)))
            assert connection.num_streams == 0
            replies = []
            while not replies:
                with contextlib.suppress(OverloadedError, ProtocolError):
                    replies.append(
                        await rpc.call(connection, InfoRequest(), [bytes(2 * MIB)], reply=InfoRequest, timeout_s=30)
                    )
            assert replies[0].received_payload == bytes(2 * MIB)

    run(main())
