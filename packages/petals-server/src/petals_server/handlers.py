"""What a server answers on its streams. Everything a client sends is checked here, before the device sees it."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any, Final

from petals_core.errors import (
    CacheLostError,
    DrainingError,
    InvalidRequestError,
    PetalsError,
    WrongModelError,
)
from petals_core.identity import PeerId
from petals_core.models.span import Span
from petals_core.net.stream import Stream
from petals_core.tensors.states import States
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
    SessionOpened,
    Step,
    graph_id_of,
)
from petals_server.comfort.ledger import ServedLedger
from petals_server.config import ServerLimits
from petals_server.contribution.desk import ContributionDesk
from petals_server.engine import Engine
from petals_server.execution.forward import ForwardWork
from petals_server.execution.lone import LoneSession, LoneStepWork
from petals_server.execution.next_token import NextToken
from petals_server.execution.probe import Form
from petals_server.execution.session import SessionState
from petals_server.execution.states import EncodedStates, PackedStates
from petals_server.execution.steps import StepRunner, StepWork
from petals_server.loading import ServedModel
from petals_server.positions import check_positions
from petals_server.request_checks import check_states, check_step
from petals_server.ring.session import RingSession
from petals_server.ring.table import RING_REQUESTS, RingTable
from petals_server.sessions import Reservation, SessionTable
from petals_server.training_requests import TrainingRequests, is_for_training, read_session_prompts
from petals_server.work import Work

_FIRST_MESSAGE_TIMEOUT_S: Final = 30.0
_MAX_SPANS: Final = 16
"""Parts of the span that are kept ready; each costs some Python objects, the weights are shared."""


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
        self._spans: dict[tuple[int, int], Span] = {(model.span.start, model.span.end): model.span}
        self._runners: dict[Span, StepRunner] = {} if model.runner is None else {model.span: model.runner}
        """Of the spans in ``_spans``."""

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
                await self._serve_session(stream, request, message)
            elif isinstance(request, Backward):
                await self._serve_backward(stream, request, message)
            elif isinstance(request, OpenTuning):
                span = await self._find_span(request.fingerprint, request.start, request.end)
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

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def _serve_session(self, stream: Stream, request: OpenSession, message: Message) -> None:
        deadline_s = time.monotonic() + request.deadline_ms / 1000
        span = await self._find_span(request.fingerprint, request.start, request.end)
        if request.keeps_graphs:
            await self._serve_training_session(stream, request, span, deadline_s)
            return
        reservation = await self.sessions.open(
            stream.peer_id, num_rows=request.num_rows, max_length=request.max_length, deadline_s=deadline_s
        )
        session: SessionState | None = None
        try:
            kind = LoneSession if self.model.form is Form.ALONE else SessionState
            session = kind(
                span,
                self.model.pages,
                num_rows=request.num_rows,
                max_length=request.max_length,
                prompts=read_session_prompts(request, message, span),
                adapters=self.training.find_session_adapters(stream.peer_id, request, span),
            )
            reservation.on_evicted = functools.partial(self._engine.close_session, session, session.close)
            next_token = self._next_token(session)

            async def handle(place: RingSession, step: Step, message: Message, arrived_s: float) -> None:
                try:
                    if next_token is None or not await self._serve_token(
                        place, next_token, reservation, step, message, arrived_s
                    ):
                        await self._serve_step(place, session, reservation, step, message, arrived_s)
                except PetalsError as error:
                    # A step that was refused before it began has changed nothing, so the session goes on.
                    if session.is_broken or isinstance(error, CacheLostError):
                        place.end(error)
                    raise

            with self.ring.opened(request.session_id, stream) as place:
                await stream.send(SessionOpened(cache_tokens_left=self.sessions.cache_tokens_left))
                await place.run(handle, max_idle_s=self._limits.max_idle_s)
        finally:
            if session is not None:
                self._engine.close_session(session, session.close)
            self.sessions.close(reservation)

    async def _serve_training_session(
        self, stream: Stream, request: OpenSession, span: Span, deadline_s: float
    ) -> None:
        """Forwards around the ring whose graphs are kept. A session counts as such, and needs no room in the cache."""
        if request.tensors:
            raise InvalidRequestError("sessions whose graphs are kept take no deep prompts: send forwards")
        reservation = await self.sessions.open(stream.peer_id, num_rows=1, max_length=1, deadline_s=deadline_s)

        async def handle(place: RingSession, step: Step, message: Message, arrived_s: float) -> None:
            forward = Forward(
                fingerprint=request.fingerprint,
                start=request.start,
                end=request.end,
                row_tokens=step.row_tokens,
                tensors=step.tensors[:1],
                deadline_ms=step.deadline_ms,
                position_runs=step.position_runs,
                graph_id=graph_id_of(request.session_id, step.step),
                active_adapter=request.active_adapter,
                tuning=request.tuning,
            )
            self._check_size(forward)
            work, results, _ = await self.training.forward(stream.peer_id, forward, message, span, arrived_s=arrived_s)
            await place.deliver(
                step,
                States(spec=results[0].spec, payload=results[0].buffers),
                queue_us=_microseconds(work.queue_s),
                compute_us=_microseconds(work.compute_s),
                deadline_s=arrived_s + step.deadline_ms / 1000,
            )
            self._note(stream.peer_id, step, span)

        try:
            with self.ring.opened(request.session_id, stream, keeps_outputs=False) as place:
                await stream.send(SessionOpened(cache_tokens_left=self.sessions.cache_tokens_left))
                await place.run(handle, max_idle_s=self._limits.max_idle_s)
        finally:
            self.sessions.close(reservation)

    async def _serve_token(
        self,
        place: RingSession,
        token: NextToken,
        reservation: Reservation,
        step: Step,
        message: Message,
        arrived_s: float,
    ) -> bool:
        """Serve a session's next token the short way; False: it is a step that has to go the general one."""
        payload = message.received_payload
        num_tokens = self.sessions.count_tokens(1, step.keep + 1)
        if not self.sessions.holds(reservation, num_tokens) or not token.fits(step, payload):
            return False
        started_s = time.monotonic()
        output = self._engine.compute_here(token.session, functools.partial(token.compute, payload))
        if output is None:
            return False
        ended_s = time.monotonic()
        try:
            await place.deliver(
                step,
                output,
                queue_us=_microseconds(started_s - arrived_s),
                compute_us=_microseconds(ended_s - started_s),
                deadline_s=arrived_s + step.deadline_ms / 1000,
            )
        finally:
            self._engine.note_here(token.session, reservation.peer_id, started_s=started_s, ended_s=ended_s)
        self._note(reservation.peer_id, step, token.session.span)
        return True

    async def _serve_step(
        self,
        place: RingSession,
        session: SessionState,
        reservation: Reservation,
        step: Step,
        message: Message,
        arrived_s: float,
    ) -> None:
        row_order = step.row_order if step.step > place.applied else None  # rows change places once
        states = check_step(step, message, session)
        if self.model.max_positions is not None:
            lengths = session.ledger.count_within(step.keep)
            if row_order is not None:
                lengths = [lengths[row] for row in row_order]
            check_positions(step.row_tokens, step.position_runs, self.model.max_positions, row_lengths=lengths)
        num_columns = step.keep + max(step.row_tokens)
        deadline_s = arrived_s + step.deadline_ms / 1000
        work = self._step_work(
            session,
            states,
            keep=step.keep,
            row_order=row_order,
            deadline_s=deadline_s,
            max_turn_tokens=max(1, min(self._max_turn_tokens, self.model.max_scores // max(1, num_columns))),
            peer_id=reservation.peer_id,
        )
        num_rows = session.ledger.num_rows
        await self.sessions.grow(reservation, self.sessions.count_tokens(num_rows, num_columns), deadline_s=deadline_s)
        try:
            result = await self._engine.compute(work)
        finally:
            self.sessions.settle(reservation, self.sessions.count_tokens(num_rows, session.ledger.num_columns))
        await place.deliver(
            step,
            States(spec=result.spec, payload=result.buffers),
            queue_us=_microseconds(work.queue_s),
            compute_us=_microseconds(work.compute_s),
            deadline_s=deadline_s,
        )
        self._note(reservation.peer_id, step, session.span)

    def _step_work(self, session: SessionState, states: PackedStates, **options: Any) -> Work[EncodedStates]:
        if isinstance(session, LoneSession):
            return LoneStepWork(session, self.model.threads, states, **options)
        return StepWork(session, self._runner(session.span), states, **options)

    def _next_token(self, session: SessionState) -> NextToken | None:
        if isinstance(session, LoneSession):
            return None
        return NextToken(session, self._runner(session.span), max_positions=self.model.max_positions)

    def _runner(self, span: Span) -> StepRunner:
        runner = self._runners.get(span)
        if runner is None:
            assert self.model.cache is not None
            runner = self._runners[span] = StepRunner(
                span,
                self.model.cache,
                first_layer=span.start - self.model.span.start,
                form=self.model.form,
                threads=self.model.threads,
                kernel=self.model.kernel,
                with_replay=self.model.with_replay,
            )
        return runner

    # --- forward ------------------------------------------------------------------------------------------------------

    async def _serve_forward(self, stream: Stream, request: Forward, message: Message) -> None:
        arrived_s = time.monotonic()
        span = await self._find_span(request.fingerprint, request.start, request.end)
        self._check_size(request)
        work: Work[EncodedStates] = ForwardWork(
            span,
            self.model.threads,
            check_states(request, message, span.hidden_size),
            deadline_s=arrived_s + request.deadline_ms / 1000,
            max_turn_tokens=self._max_turn_tokens,
            peer_id=stream.peer_id,
        )
        result = await self._engine.compute(work)
        self._note(stream.peer_id, request, span)
        await stream.send(
            ForwardResult(
                tensors=(result.spec.to_wire(),),
                queue_us=_microseconds(work.queue_s),
                compute_us=_microseconds(work.compute_s),
            ),
            result.buffers,
            end=True,
        )

    async def _serve_training_forward(self, stream: Stream, request: Forward, message: Message) -> None:
        arrived_s = time.monotonic()
        span = await self._find_span(request.fingerprint, request.start, request.end)
        self._check_size(request)
        work, results, is_kept = await self.training.forward(
            stream.peer_id, request, message, span, arrived_s=arrived_s
        )
        self._note(stream.peer_id, request, span)
        await stream.send(
            ForwardResult(
                tensors=tuple(result.spec.to_wire() for result in results),
                queue_us=_microseconds(work.queue_s),
                compute_us=_microseconds(work.compute_s),
                is_kept=is_kept,
            ),
            [buffer for result in results for buffer in result.buffers],
            end=True,
        )

    async def _serve_backward(self, stream: Stream, request: Backward, message: Message) -> None:
        arrived_s = time.monotonic()
        span = await self._find_span(request.fingerprint, request.start, request.end)
        self._check_size(request)
        work, results = await self.training.backward(stream.peer_id, request, message, span, arrived_s=arrived_s)
        self._note(stream.peer_id, request, span)
        await stream.send(
            BackwardResult(
                tensors=tuple(result.spec.to_wire() for result in results),
                queue_us=_microseconds(work.queue_s),
                compute_us=_microseconds(work.compute_s),
            ),
            [buffer for result in results for buffer in result.buffers],
            end=True,
        )

    def _note(self, peer_id: PeerId, request: Step | Forward | Backward, span: Span) -> None:
        self.served.note(peer_id, num_tokens=sum(request.row_tokens), num_blocks=span.end - span.start)

    def _check_size(self, request: Forward | Backward) -> None:
        """Raise ``InvalidRequestError`` if a request without a session is too large for this server or model."""
        row_tokens = request.row_tokens
        check_positions(row_tokens, request.position_runs, self.model.max_positions)
        num_tokens = sum(row_tokens)
        if num_tokens > self._limits.max_forward_tokens:
            raise InvalidRequestError(
                f"a request of {num_tokens} tokens is over the {self._limits.max_forward_tokens} that this server "
                "takes at once: send the rows in several requests"
            )
        if max(row_tokens) ** 2 > self.model.max_scores:
            raise InvalidRequestError(
                f"there is no memory for the attention of a row of {max(row_tokens)} tokens in one go: send "
                "shorter rows, or open a session"
            )

    async def _find_span(self, fingerprint: str, start: int, end: int) -> Span:
        """The part of our span that a client wants; raises ``WrongModelError`` if we do not hold it."""
        model = self.model
        if fingerprint != model.fingerprint:
            raise WrongModelError(f"this server holds another checkpoint: {model.name} {model.fingerprint[:12]}")
        if not model.span.start <= start < end <= model.span.end:
            raise WrongModelError(
                f"this server holds blocks {model.span.start}:{model.span.end}, which do not include {start}:{end}"
            )
        span = self._spans.get((start, end))
        if span is None:
            span = await self._engine.call(lambda: model.span.slice(start, end))
            while len(self._spans) >= _MAX_SPANS:
                oldest = self._spans.pop(list(self._spans)[1])  # but the first, which is the whole span
                self._runners.pop(oldest, None)
            self._spans[start, end] = span
        return span


def _microseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e6))
