"""How a server answers the sessions of its clients: with a cache, or, for training, with graphs that are kept."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from petals_core.errors import CacheLostError, InvalidRequestError, PetalsError
from petals_core.models.span import Span
from petals_core.net.stream import Stream
from petals_core.steps import join_row_tokens
from petals_core.tensors.states import States
from petals_core.wire.messages import Forward, Message, OpenSession, SessionOpened, Step, graph_id_of
from petals_server.comfort.ledger import ServedLedger
from petals_server.config import ServerLimits
from petals_server.engine import Engine
from petals_server.execution.lone import LoneSession, LoneStepWork
from petals_server.execution.next_token import NextToken
from petals_server.execution.probe import Form
from petals_server.execution.session import SessionState
from petals_server.execution.states import EncodedStates, InputStates, JoinedStates
from petals_server.execution.steps import StepWork
from petals_server.loading import ServedModel
from petals_server.positions import check_positions
from petals_server.request_checks import check_size, check_states, check_step
from petals_server.ring.session import Received, RingSession
from petals_server.ring.table import RingTable
from petals_server.sessions import Reservation, SessionTable
from petals_server.spans import ServedSpans
from petals_server.training_requests import TrainingRequests, read_session_prompts
from petals_server.work import Work, microseconds


class SessionRequests:
    """Serves the sessions of one server. Belongs to one event loop."""

    def __init__(
        self,
        *,
        model: ServedModel,
        spans: ServedSpans,
        engine: Engine,
        sessions: SessionTable,
        ring: RingTable,
        training: TrainingRequests,
        served: ServedLedger,
        limits: ServerLimits,
        max_turn_tokens: int,
    ) -> None:
        self._model = model
        self._spans = spans
        self._engine = engine
        self._sessions = sessions
        self._ring = ring
        self._training = training
        self._served = served
        self._limits = limits
        self._max_turn_tokens = max_turn_tokens

    async def serve(self, stream: Stream, request: OpenSession, message: Message) -> None:
        """Open a session, and serve it until its client ends or gives up the stream.

        Raises:
            PetalsError: it can't be opened, or is over for another reason.
        """
        deadline_s = time.monotonic() + request.deadline_ms / 1000
        span = await self._spans.find(request.fingerprint, request.start, request.end)
        if request.keeps_graphs:
            await self._serve_with_graphs(stream, request, span, deadline_s)
        else:
            await self._serve_with_cache(stream, request, message, span, deadline_s)

    async def _serve_with_cache(
        self, stream: Stream, request: OpenSession, message: Message, span: Span, deadline_s: float
    ) -> None:
        reservation = await self._sessions.open(
            stream.peer_id, num_rows=request.num_rows, max_length=request.max_length, deadline_s=deadline_s
        )
        session: SessionState | None = None
        try:
            kind = LoneSession if self._model.form is Form.ALONE else SessionState
            session = kind(
                span,
                self._model.pages,
                num_rows=request.num_rows,
                max_length=request.max_length,
                prompts=read_session_prompts(request, message, span),
                adapters=self._training.find_session_adapters(stream.peer_id, request, span),
            )
            reservation.on_evicted = functools.partial(self._engine.close_session, session, session.close)
            next_token = self._next_token(session)

            async def handle(place: RingSession, steps: Sequence[Received]) -> None:
                try:
                    is_served = (
                        next_token is not None
                        and len(steps) == 1
                        and await self._serve_token(place, next_token, reservation, steps[0])
                    )
                    if not is_served:
                        await self._serve_steps(place, session, reservation, steps)
                except PetalsError as error:
                    # A step that was refused before it began has changed nothing, so the session goes on.
                    if session.is_broken or isinstance(error, CacheLostError):
                        place.end(error)
                    raise

            with self._ring.opened(request.session_id, stream) as place:
                await stream.send(SessionOpened(cache_tokens_left=self._sessions.cache_tokens_left))
                await place.run(handle, max_idle_s=self._limits.max_idle_s)
        finally:
            if session is not None:
                self._engine.close_session(session, session.close)
            self._sessions.close(reservation)

    async def _serve_with_graphs(self, stream: Stream, request: OpenSession, span: Span, deadline_s: float) -> None:
        """Forwards around the ring whose graphs are kept. A session counts as such, and needs no room in the cache."""
        if request.tensors:
            raise InvalidRequestError("sessions whose graphs are kept take no deep prompts: send forwards")
        reservation = await self._sessions.open(stream.peer_id, num_rows=1, max_length=1, deadline_s=deadline_s)

        async def handle(place: RingSession, steps: Sequence[Received]) -> None:
            (received,) = steps
            step = received.step
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
            check_size(forward, self._model, self._limits)
            work, results, _ = await self._training.forward(
                stream.peer_id, forward, received.message, span, arrived_s=received.arrived_s
            )
            await place.deliver(
                step,
                States(spec=results[0].spec, payload=results[0].buffers),
                queue_us=microseconds(work.queue_s),
                compute_us=microseconds(work.compute_s),
                deadline_s=received.deadline_s,
            )
            self._served.note(stream.peer_id, num_tokens=sum(step.row_tokens), num_blocks=span.num_blocks)

        try:
            with self._ring.opened(request.session_id, stream, has_cache=False) as place:
                await stream.send(SessionOpened(cache_tokens_left=self._sessions.cache_tokens_left))
                await place.run(handle, max_idle_s=self._limits.max_idle_s)
        finally:
            self._sessions.close(reservation)

    # --- steps --------------------------------------------------------------------------------------------------------

    async def _serve_token(
        self, place: RingSession, token: NextToken, reservation: Reservation, received: Received
    ) -> bool:
        """Serve a session's next token the short way; False: it is a step that has to go the general one."""
        step, payload = received.step, received.message.received_payload
        num_tokens = self._sessions.count_tokens(1, step.keep + 1)
        if not self._sessions.holds(reservation, num_tokens) or not token.fits(step, payload):
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
                queue_us=microseconds(started_s - received.arrived_s),
                compute_us=microseconds(ended_s - started_s),
                deadline_s=received.deadline_s,
            )
        finally:
            self._engine.note_here(token.session, reservation.peer_id, started_s=started_s, ended_s=ended_s)
        self._note(reservation, step, token.session)
        return True

    async def _serve_steps(
        self, place: RingSession, session: SessionState, reservation: Reservation, steps: Sequence[Received]
    ) -> None:
        """Serve a step, or compute at once several of which each continues the one before it."""
        try:
            work, results = await self._compute(place, session, reservation, steps)
        except PetalsError:
            if len(steps) == 1 or session.is_broken:
                raise
            for each in steps:  # nothing has changed, so those before the one that can't be served are
                await self._serve_steps(place, session, reservation, [each])
            return
        token_s = work.compute_s / max(1, work.num_tokens)
        for index, (each, result) in enumerate(zip(steps, results, strict=True)):
            await place.deliver(
                each.step,
                States(spec=result.spec, payload=result.buffers),
                queue_us=microseconds(work.queue_s),
                compute_us=microseconds(token_s * sum(each.step.row_tokens)),
                deadline_s=each.deadline_s,
                is_followed=index + 1 < len(steps),
            )
            self._note(reservation, each.step, session)

    async def _compute(
        self, place: RingSession, session: SessionState, reservation: Reservation, steps: Sequence[Received]
    ) -> tuple[Work[tuple[EncodedStates, ...]], tuple[EncodedStates, ...]]:
        """Compute steps as one; returns the work, and what came of each."""
        step = steps[0].step
        if len(steps) > 1:
            step = replace(step, row_tokens=join_row_tokens(each.step.row_tokens for each in steps))
        check_step(step, session)
        packed = [check_states(each.step, each.message, session.span.hidden_size) for each in steps]
        row_order = step.row_order if step.step > place.applied else None  # rows change places once
        if self._model.max_positions is not None:
            lengths = session.ledger.count_within(step.keep)
            if row_order is not None:
                lengths = [lengths[row] for row in row_order]
            check_positions(step.row_tokens, step.position_runs, self._model.max_positions, row_lengths=lengths)
        num_columns = step.keep + max(step.row_tokens)
        deadline_s = min(each.deadline_s for each in steps)
        work = self._step_work(
            session,
            packed[0] if len(packed) == 1 else JoinedStates(tuple(packed)),
            keep=step.keep,
            row_order=row_order,
            deadline_s=deadline_s,
            max_turn_tokens=max(1, min(self._max_turn_tokens, self._model.max_scores // max(1, num_columns))),
            peer_id=reservation.peer_id,
        )
        num_rows = session.ledger.num_rows
        num_tokens = self._sessions.count_tokens(num_rows, num_columns)
        await self._sessions.grow(reservation, num_tokens, deadline_s=deadline_s)
        try:
            return work, await self._engine.compute(work)
        finally:
            self._sessions.settle(reservation, self._sessions.count_tokens(num_rows, session.ledger.num_columns))

    def _step_work(self, session: SessionState, states: InputStates, **options: Any) -> Work[tuple[EncodedStates, ...]]:
        if isinstance(session, LoneSession):
            return LoneStepWork(session, self._model.threads, states, **options)
        return StepWork(session, self._spans.runner(session.span), states, **options)

    def _next_token(self, session: SessionState) -> NextToken | None:
        if isinstance(session, LoneSession):
            return None
        return NextToken(session, self._spans.runner(session.span), max_positions=self._model.max_positions)

    def _note(self, reservation: Reservation, step: Step, session: SessionState) -> None:
        num_tokens = sum(step.row_tokens)
        self._served.note(reservation.peer_id, num_tokens=num_tokens, num_blocks=session.span.num_blocks)
