"""What a server answers on its streams. Everything a client sends is checked here, before the device sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from petals_core.errors import DrainingError, InvalidRequestError
from petals_core.identity import PeerId
from petals_core.models.span import Span
from petals_core.net.stream import Stream
from petals_core.wire.messages import (
    Backward,
    BackwardResult,
    Contribution,
    Forward,
    ForwardResult,
    Info,
    InfoRequest,
    Message,
    OpenSession,
    OpenTuning,
)
from petals_server.comfort.ledger import ServedLedger
from petals_server.config import ServerLimits
from petals_server.contribution.desk import ContributionDesk
from petals_server.engine import Engine
from petals_server.execution.forward import ForwardWork
from petals_server.execution.states import EncodedStates
from petals_server.loading import ServedModel
from petals_server.request_checks import check_size, check_states
from petals_server.ring.table import RING_REQUESTS, RingTable
from petals_server.session_requests import SessionRequests
from petals_server.sessions import SessionTable
from petals_server.spans import ServedSpans
from petals_server.training_requests import TrainingRequests, is_for_training
from petals_server.work import Work, microseconds

_FIRST_MESSAGE_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a server says of itself besides its model."""

    version: str
    public_name: str


class RequestHandler:
    """Answers the streams of one server: a listener's handler.

    What it raises the listener tells to the client. When a client vanishes the listener cancels its task, and with that
    the client's session is closed and its waiting work dropped.
    """

    def __init__(
        self,
        *,
        model: ServedModel,
        engine: Engine,
        sessions: SessionTable,
        ring: RingTable,
        limits: ServerLimits,
        facts: ServerFacts,
        served: ServedLedger | None = None,
        desk: ContributionDesk | None = None,
    ) -> None:
        self.served = served or ServedLedger()
        self._desk = desk
        self.model = model
        self.sessions = sessions
        self.ring = ring
        self.state = "online"
        self.num_requests = 0
        """Sessions and forward requests under way."""
        self._engine = engine
        self._limits = limits
        self._facts = facts
        self._max_turn_tokens = limits.max_turn_tokens or model.max_turn_tokens
        self.training = TrainingRequests(
            model=model, engine=engine, limits=limits, max_turn_tokens=self._max_turn_tokens
        )
        self._spans = ServedSpans(model, engine)
        self._sessions = SessionRequests(
            model=model,
            spans=self._spans,
            engine=engine,
            sessions=sessions,
            ring=ring,
            training=self.training,
            served=self.served,
            limits=limits,
            max_turn_tokens=self._max_turn_tokens,
        )

    async def __call__(self, stream: Stream) -> None:
        message = await stream.receive(timeout_s=_FIRST_MESSAGE_TIMEOUT_S)
        request = message.body
        if isinstance(request, InfoRequest):
            await stream.send(self.info(), end=True)
            return
        if isinstance(request, Contribution) and self._desk is not None:
            await self._desk.serve(stream, request)
            return
        if isinstance(request, RING_REQUESTS):
            await self.ring.serve(stream, request)
            return
        if not isinstance(request, (OpenSession, Forward, Backward, OpenTuning)):
            raise InvalidRequestError(f"a stream can't begin with {type(request).__name__}: open a session first")
        if self.state != "online":
            raise DrainingError("the server is about to stop and takes no new work")
        self.num_requests += 1
        self.served.begin()
        try:
            if isinstance(request, OpenSession):
                await self._sessions.serve(stream, request, message)
            elif isinstance(request, Backward):
                await self._serve_backward(stream, request, message)
            elif isinstance(request, OpenTuning):
                span = await self._spans.find(request.fingerprint, request.start, request.end)
                await self.training.sessions.serve(stream, request, message, span)
            elif is_for_training(request):
                await self._serve_training_forward(stream, request, message)
            else:
                await self._serve_forward(stream, request, message)
        finally:
            self.num_requests -= 1

    def info(self) -> Info:
        """What the server is, and how busy."""
        model = self.model
        return Info(
            model_name=model.name,
            fingerprint=model.fingerprint,
            num_blocks=model.num_blocks,
            start=model.span.start,
            end=model.span.end,
            state=self.state,
            torch_dtype=model.torch_dtype,
            quantization=model.quantization,
            version=self._facts.version,
            public_name=self._facts.public_name,
            cache_tokens_left=self.sessions.cache_tokens_left,
            num_sessions=len(self.sessions),
        )

    # --- forward ------------------------------------------------------------------------------------------------------

    async def _serve_forward(self, stream: Stream, request: Forward, message: Message) -> None:
        arrived_s = time.monotonic()
        span = await self._spans.find(request.fingerprint, request.start, request.end)
        check_size(request, self.model, self._limits)
        work: Work[tuple[EncodedStates, ...]] = ForwardWork(
            span,
            self.model.threads,
            check_states(request, message, span.hidden_size),
            deadline_s=arrived_s + request.deadline_ms / 1000,
            max_turn_tokens=self._max_turn_tokens,
            peer_id=stream.peer_id,
        )
        (result,) = await self._engine.compute(work)
        self._note(stream.peer_id, request, span)
        await stream.send(
            ForwardResult(
                tensors=(result.spec.to_wire(),),
                queue_us=microseconds(work.queue_s),
                compute_us=microseconds(work.compute_s),
            ),
            result.buffers,
            end=True,
        )

    async def _serve_training_forward(self, stream: Stream, request: Forward, message: Message) -> None:
        arrived_s = time.monotonic()
        span = await self._spans.find(request.fingerprint, request.start, request.end)
        check_size(request, self.model, self._limits)
        work, results, is_kept = await self.training.forward(
            stream.peer_id, request, message, span, arrived_s=arrived_s
        )
        self._note(stream.peer_id, request, span)
        await stream.send(
            ForwardResult(
                tensors=tuple(result.spec.to_wire() for result in results),
                queue_us=microseconds(work.queue_s),
                compute_us=microseconds(work.compute_s),
                is_kept=is_kept,
            ),
            [buffer for result in results for buffer in result.buffers],
            end=True,
        )

    async def _serve_backward(self, stream: Stream, request: Backward, message: Message) -> None:
        arrived_s = time.monotonic()
        span = await self._spans.find(request.fingerprint, request.start, request.end)
        check_size(request, self.model, self._limits)
        work, results = await self.training.backward(stream.peer_id, request, message, span, arrived_s=arrived_s)
        self._note(stream.peer_id, request, span)
        await stream.send(
            BackwardResult(
                tensors=tuple(result.spec.to_wire() for result in results),
                queue_us=microseconds(work.queue_s),
                compute_us=microseconds(work.compute_s),
            ),
            [buffer for result in results for buffer in result.buffers],
            end=True,
        )

    def _note(self, peer_id: PeerId, request: Forward | Backward, span: Span) -> None:
        self.served.note(peer_id, num_tokens=sum(request.row_tokens), num_blocks=span.num_blocks)
