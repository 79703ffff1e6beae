"""A few tokens through a server that may come next, timed from the push to the answer.

What a server says of its own computing plays no part in it. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Final

from petals_core.announcement import Announcement
from petals_core.errors import ProtocolError
from petals_core.net.connection import PeerConnection
from petals_core.net.rpc import call
from petals_core.net.stream import Stream
from petals_core.observation import MAX_EXCUSE, MIN_REQUESTS
from petals_core.routing.cost import SESSION_SHARE
from petals_core.wire.frames import Priority
from petals_core.wire.messages import SESSION_ID_BYTES, Info, InfoRequest, OpenSession, SessionOpened, Step, StepResult

NUM_STEPS: Final = MIN_REQUESTS + 1
"""The first one is not counted: it may have to prepare something."""
TIMEOUT_S: Final = 15.0
_ITEM_BYTES: Final = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One decode step through all blocks of a server."""

    expected_s: float
    """By what it announces, and the sessions that it has."""
    took_s: float
    """What it took beside the way there and back."""


async def try_decoding(connection: PeerConnection, announced: Announcement, *, hidden_size: int) -> list[Timing]:
    """Open a session of one row, as any client might, and time its steps; none if all of it takes more than 15 s.

    Raises:
        PetalsError: the server takes no session now, or has ended it.
    """
    assert announced.inference_tokens_per_s
    timings: list[Timing] = []
    stream: Stream | None = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            asked_s = time.perf_counter()
            info = (await call(connection, InfoRequest(), reply=Info, timeout_s=TIMEOUT_S)).body
            assert isinstance(info, Info)
            round_trip_s = min(connection.rtt_s, time.perf_counter() - asked_s)
            busy = min(MAX_EXCUSE, 1 + SESSION_SHARE * info.num_sessions)
            stream = connection.open_stream(Priority.DECODE)
            await _open(stream, announced)
            for number in range(NUM_STEPS):
                began_s = time.perf_counter()
                await _step(stream, announced.torch_dtype, hidden_size, number)
                took_s = max(0.0, time.perf_counter() - began_s - round_trip_s)
                timings.append(Timing(expected_s=busy / announced.inference_tokens_per_s, took_s=took_s))
    except TimeoutError:
        pass  # so slow a server is not timed
    finally:
        if stream is not None:
            stream.cancel()
    return timings[1:] if len(timings) == NUM_STEPS else []


async def _open(stream: Stream, announced: Announcement) -> None:
    await stream.send(
        OpenSession(
            session_id=os.urandom(SESSION_ID_BYTES),
            fingerprint=announced.fingerprint,
            start=announced.start,
            end=announced.end,
            num_rows=1,
            max_length=NUM_STEPS,
            deadline_ms=int(1000 * TIMEOUT_S),
        )
    )
    reply = (await stream.receive(timeout_s=None)).body
    if not isinstance(reply, SessionOpened):
        raise ProtocolError(f"the server answered with {type(reply).__name__} to the opening of a session")


async def _step(stream: Stream, torch_dtype: str, hidden_size: int, number: int) -> None:
    payload = bytes(hidden_size * _ITEM_BYTES[torch_dtype])
    await stream.send(
        Step(
            step=number,
            keep=number,
            row_tokens=(1,),
            tensors=(([1, hidden_size], torch_dtype, torch_dtype, "none", len(payload)),),
            deadline_ms=int(1000 * TIMEOUT_S),
        ),
        (payload,),
    )
    reply = (await stream.receive(timeout_s=None)).body
    if not isinstance(reply, StepResult) or reply.step != number:
        raise ProtocolError("the server answered a step with something else")
