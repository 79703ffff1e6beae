"""One request, one reply."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from petals_core.errors import ProtocolError
from petals_core.net.connection import PeerConnection
from petals_core.net.stream import EndOfStreamError
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Body, Buffer, Message

B = TypeVar("B", bound=Body)


async def call(
    connection: PeerConnection,
    body: Body,
    payload: Sequence[Buffer] = (),
    *,
    reply: type[B],
    priority: Priority = Priority.BULK,
    timeout_s: float,
) -> Message:
    """Send one request on a stream of its own and return the reply, whose body is a ``reply``.

    Whatever happens, also cancellation, the stream is gone afterwards and the peer has been told.

    Raises:
        DeadlineExceededError: request and reply together took longer than ``timeout_s``.
        PeerConnectionError: the connection is lost.
        DrainingError, OverloadedError: the peer takes no new stream.
        FrameTooLargeError: the peer takes no request of this size.
        ProtocolError: the peer answered with something else, or not at all.
        PetalsError: the peer's own error.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    stream = connection.open_stream(priority)
    try:
        await stream.send(body, payload, end=True, timeout_s=timeout_s)
        message = await stream.receive(timeout_s=max(0.0, deadline - clock()))
    except BaseException as error:
        stream.cancel()
        if isinstance(error, EndOfStreamError):
            raise ProtocolError(f"peer {connection.peer_id.short} ended the stream without an answer") from None
        raise
    stream.abandon()
    if not isinstance(message.body, reply):
        raise ProtocolError(
            f"peer {connection.peer_id.short} answered with {type(message.body).__name__}, expected {reply.__name__}"
        )
    return message
