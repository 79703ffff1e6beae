"""One session's streams through a chain of servers, and requests without a session. The client carries the states."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from petals_client.history import StepHistory
from petals_client.trace import HopTrace
from petals_core.errors import DeadlineExceededError, ProtocolError
from petals_core.net.dialer import PeerConnection
from petals_core.net.stream import EndOfStreamError, Stream
from petals_core.routing.graph import Hop
from petals_core.tensors.codec import TensorSpec, decode, encode
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Buffer, Message, OpenSession, SessionOpened, Step, StepResult

if TYPE_CHECKING:
    from petals_client.chain import StepRequest

_MAX_DECODE_TOKENS = 32
"""Steps up to this size overtake bulk on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Hidden states [N, H] as they travel."""

    spec: TensorSpec
    payload: Sequence[Buffer]


def read_states(message: Message, tensors: Sequence[object], expected: TensorSpec) -> States:
    """Check that a reply holds states of the shape and dtype that went in.

    Raises:
        ProtocolError: it does not.
    """
    if len(tensors) != 1:
        raise ProtocolError(f"the server answered with {len(tensors)} tensors instead of one")
    spec = TensorSpec.from_wire(tensors[0])
    if spec.shape != expected.shape or spec.dtype != expected.dtype:
        raise ProtocolError(
            f"the server answered with {spec.dtype}{list(spec.shape)} to {expected.dtype}{list(expected.shape)}"
        )
    payload = message.received_payload
    if payload.nbytes != spec.num_bytes:
        raise ProtocolError(f"the server announced {spec.num_bytes} bytes and sent {payload.nbytes}")
    return States(spec=spec, payload=(payload,))


class HopSession:
    """A session with one server: steps go in, results come out in the same order."""

    def __init__(self, hop: Hop, stream: Stream, *, history_bytes: int) -> None:
        self.hop = hop
        self.history: StepHistory[States] = StepHistory(history_bytes)
        """What has to be sent to another server to bring it where this one is; its user keeps it."""
        self._stream = stream
        self._next_step = 0
        self._sending = asyncio.Lock()
        self._receiving = asyncio.Lock()
        self.num_under_way = 0
        """Steps that were sent and not answered."""

    @classmethod
    async def open(
        cls,
        connection: PeerConnection,
        hop: Hop,
        request: OpenSession,
        payload: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        history_bytes: int,
    ) -> HopSession:
        """Open a stream and the session on it; on failure nothing is left.

        Raises:
            PetalsError: the server refused, or did not answer in time.
        """
        stream = connection.open_stream(Priority.DECODE)
        try:
            async with asyncio.timeout(timeout_s):
                await stream.send(request, payload)
                reply = await stream.receive(timeout_s=None)
            if not isinstance(reply.body, SessionOpened):
                raise ProtocolError(f"the server answered with {type(reply.body).__name__} to the opening of a session")
        except TimeoutError:
            stream.cancel()
            raise DeadlineExceededError(f"it did not open a session within {timeout_s:g} s") from None
        except BaseException:
            stream.cancel()
            raise
        return cls(hop, stream, history_bytes=history_bytes)

    async def step(self, request: StepRequest, states: States, *, timeout_s: float) -> tuple[States, HopTrace]:
        """Run one step. Several may be under way, each behind the one that was called before.

        Raises:
            PetalsError: the step failed. The session must then be closed.
        """
        started_s = time.perf_counter()  # uvloop's clock counts milliseconds
        stream = self._stream
        self.num_under_way += 1
        # The locks are fair, so that replies are received in the order in which the steps were sent.
        async with self._sending:
            number = self._next_step
            self._next_step += 1
            body = Step(
                step=number,
                keep=request.keep,
                row_tokens=request.row_tokens,
                row_order=request.row_order,
                position_runs=request.position_runs,
                tensors=(states.spec.to_wire(),),
                deadline_ms=max(1, int(timeout_s * 1000)),
            )
            stream.priority = Priority.DECODE if states.spec.shape[0] <= _MAX_DECODE_TOKENS else Priority.BULK
            await stream.send(body, states.payload, timeout_s=timeout_s)
        async with self._receiving:
            try:
                message = await stream.receive(timeout_s=max(0.0, timeout_s - (time.perf_counter() - started_s)))
            except DeadlineExceededError:
                raise DeadlineExceededError(f"no answer to a step within {timeout_s:g} s") from None
            except EndOfStreamError:
                raise ProtocolError("it ended the session by itself") from None
        self.num_under_way -= 1
        result = message.body
        if not isinstance(result, StepResult) or result.step != number:
            raise ProtocolError(f"the server answered step {number} with {type(result).__name__}")
        output = read_states(message, result.tensors, states.spec)
        trace = HopTrace(
            peer_id=self.hop.peer_id,
            start=self.hop.start,
            end=self.hop.end,
            total_s=time.perf_counter() - started_s,
            queue_s=result.queue_us / 1e6,
            compute_s=result.compute_us / 1e6,
        )
        return output, trace

    def close(self) -> None:
        """Tell the server that the session is over; never blocks."""
        self._stream.cancel()


def join_states(parts: list[tuple[tuple[int, ...], States]]) -> States:
    """Make one packed batch of several of the same rows, given as (row_tokens, states): row by row, in order."""
    tensors = [decode(each.spec, bytes(each.payload[0])) for _, each in parts]
    pieces = [tensor.split(list(row_tokens)) for (row_tokens, _), tensor in zip(parts, tensors, strict=True)]
    joined = torch.cat([piece for row in zip(*pieces, strict=True) for piece in row])
    spec, payload = encode(joined)
    return States(spec=spec, payload=payload)
