"""Low-rank matrices that clients train: held as long as a stream lasts, within a budget. Belongs to one event loop.

Letters: V values of all matrices in one row.
"""

# ruff: noqa: N806, N815 -- tensors are named by their shape

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import torch

from petals_core.announcement import DTYPES
from petals_core.errors import (
    DeadlineExceededError,
    DrainingError,
    InvalidRequestError,
    OverloadedError,
    ProtocolError,
    TuningExpiredError,
)
from petals_core.identity import PeerId
from petals_core.models.low_rank import Adapter, LoraLayout, linear_layers
from petals_core.models.span import Span
from petals_core.net.stream import Stream
from petals_core.tensors.codec import TensorSpec, decode
from petals_core.wire.messages import Message, OpenTuning, TuningReady, UpdateTuning
from petals_server.adapters import matrix_dtype
from petals_server.config import ServerLimits
from petals_server.deep_prompts import EncodedTensor
from petals_server.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TuningValues:
    """One state of a client's matrices for some blocks."""

    layout: LoraLayout
    values_V: torch.Tensor
    """All matrices in one row, as they are computed with."""
    dtype: torch.dtype
    """What the client sent, and wants their gradient in."""

    @property
    def adapter(self) -> Adapter:
        """The matrices as they are."""
        return self.layout.split(self.values_V)

    def part(self, span: Span) -> TuningValues:
        """Those of a span's blocks."""
        layout = self.layout
        return TuningValues(
            layout=layout.part(span.start, span.end),
            values_V=self.values_V[layout.place(span.start, span.end)],
            dtype=self.dtype,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class _Session:
    peer_id: PeerId
    num_bytes: int
    values_id: bytes = b""
    values: TuningValues | None = None
    used_s: float = 0.0


class TuningSessions:
    """The sessions of one server, and the memory that they share."""

    def __init__(self, *, engine: Engine, limits: ServerLimits) -> None:
        self.num_bytes = 0
        """Set aside for all sessions."""
        self._engine = engine
        self._limits = limits
        self._sessions: list[_Session] = []
        self._is_over = asyncio.Event()

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, peer_id: PeerId, values_id: bytes, span: Span) -> TuningValues:
        """The values that a peer sent for blocks that include the span's.

        Raises:
            TuningExpiredError: there are none: they have to be sent (again).
        """
        for session in self._sessions:
            values = session.values
            if (
                session.peer_id == peer_id
                and session.values_id == values_id
                and values is not None
                and values.layout.start <= span.start
                and span.end <= values.layout.end
            ):
                session.used_s = time.monotonic()
                return values.part(span)
        raise TuningExpiredError("the server does not hold these values of the adapter: send them (again)")

    async def serve(self, stream: Stream, request: OpenTuning, message: Message, span: Span) -> None:
        """Hold values until the stream ends or nobody uses them any more.

        Raises:
            InvalidRequestError: values or layers do not fit the span, or are too many.
            OverloadedError: there is no room now.
            DeadlineExceededError: they were not used for as long as a session may be idle.
            DrainingError: the server is about to stop.
        """
        layout = LoraLayout(
            start=span.start,
            shapes=tuple(linear_layers(block) for block in span.blocks),
            layers=request.layers,
            rank=request.rank,
            scaling=request.scaling,
        )
        if len(set(request.layers)) != len(request.layers):
            raise InvalidRequestError("a tuning session names a layer twice")
        session = self._reserve(stream.peer_id, layout, matrix_dtype(span).itemsize)
        try:
            await self._take_values(session, layout, request, message, span)
            while True:
                await stream.send(TuningReady(values_id=session.values_id))
                message = await self._receive(stream, session)
                if not isinstance(message.body, UpdateTuning):
                    raise InvalidRequestError(f"a tuning session takes values, not {type(message.body).__name__}")
                await self._take_values(session, layout, message.body, message, span)
        finally:
            self._sessions.remove(session)
            self.num_bytes -= session.num_bytes

    def _reserve(self, peer_id: PeerId, layout: LoraLayout, item_bytes: int) -> _Session:
        limits = self._limits
        num_bytes = layout.num_values * item_bytes
        if num_bytes == 0:
            raise InvalidRequestError(
                f"none of the layers of a tuning session ({', '.join(layout.layers)[:200]}) is in blocks "
                f"{layout.start}:{layout.end}, which have {', '.join(sorted(layout.shapes[0]))}"
            )
        if num_bytes > limits.max_tuning_session_bytes:
            raise InvalidRequestError(
                f"matrices of {num_bytes:,} bytes are over the {limits.max_tuning_session_bytes:,} that this server "
                "takes in a tuning session: use a smaller rank or fewer target_modules"
            )
        of_peer = sum(session.peer_id == peer_id for session in self._sessions)
        if of_peer >= limits.max_tuning_sessions_per_peer:
            raise OverloadedError(
                f"{of_peer} tuning sessions of one client are all that this server takes",
                retry_after_s=limits.retry_after_s,
            )
        if self.num_bytes + num_bytes > limits.max_tuning_bytes:
            raise OverloadedError("no memory is left for tuning sessions now", retry_after_s=limits.retry_after_s)
        session = _Session(peer_id=peer_id, num_bytes=num_bytes, used_s=time.monotonic())
        self.num_bytes += num_bytes
        self._sessions.append(session)
        return session

    async def _receive(self, stream: Stream, session: _Session) -> Message:
        """The next values; requests on other streams keep a session alive."""
        max_idle_s = self._limits.max_idle_s
        over = asyncio.ensure_future(self._is_over.wait())
        try:
            while True:
                left_s = max(0.0, session.used_s + max_idle_s - time.monotonic())
                values = asyncio.ensure_future(stream.receive(timeout_s=left_s))
                try:
                    await asyncio.wait((values, over), return_when=asyncio.FIRST_COMPLETED)
                    if over.done():
                        raise DrainingError("the server is about to stop")
                    return values.result()
                except DeadlineExceededError:
                    if time.monotonic() - session.used_s >= max_idle_s:
                        raise DeadlineExceededError(
                            f"the tuning session was idle for {max_idle_s:.0f} s and is closed: open a new one"
                        ) from None
                finally:
                    values.cancel()
        finally:
            over.cancel()

    def close(self) -> None:
        """End all sessions: the server takes no new requests, and those under way have what they need."""
        self._is_over.set()

    async def _take_values(
        self,
        session: _Session,
        layout: LoraLayout,
        request: OpenTuning | UpdateTuning,
        message: Message,
        span: Span,
    ) -> None:
        encoded = _read_values(request, message, layout)

        def read() -> TuningValues:
            values_V = decode(encoded.spec, encoded.payload)
            return TuningValues(
                layout=layout,
                values_V=values_V.to(device=span.device, dtype=matrix_dtype(span), copy=True),
                dtype=values_V.dtype,
            )

        session.values = await self._engine.call(read)
        session.values_id = request.values_id
        session.used_s = time.monotonic()


def _read_values(request: OpenTuning | UpdateTuning, message: Message, layout: LoraLayout) -> EncodedTensor:
    if len(request.tensors) != 1:
        raise InvalidRequestError(f"{len(request.tensors)} tensors where one is expected: the values")
    try:
        spec = TensorSpec.from_wire(request.tensors[0])
    except ProtocolError as error:
        raise InvalidRequestError(f"values: {error.message}") from None
    if spec.dtype not in DTYPES or spec.shape != (layout.num_values,):
        raise InvalidRequestError(
            f"values {spec.dtype}{list(spec.shape)} where rank {layout.rank} of {len(layout.layers)} layers in blocks "
            f"{layout.start}:{layout.end} asks for [{layout.num_values}] floating-point numbers"
        )
    payload = message.received_payload
    if payload.nbytes != spec.num_bytes:
        raise InvalidRequestError(f"values of {spec.num_bytes} bytes came with {payload.nbytes}")
    return EncodedTensor(spec=spec, payload=payload)
