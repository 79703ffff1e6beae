"""How a server answers forwards with prompts or for a later backward, and backwards: checks, and kept graphs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from petals_core.announcement import DTYPES
from petals_core.errors import GraphExpiredError, InvalidRequestError, ProtocolError
from petals_core.identity import PeerId
from petals_core.models.low_rank import Adapter
from petals_core.models.span import Span
from petals_core.tensors.codec import TensorSpec
from petals_core.wire.messages import Backward, Forward, Message, OpenSession
from petals_server.adapters import find_adapter
from petals_server.config import ServerLimits
from petals_server.deep_prompts import EncodedTensor, SessionPrompts
from petals_server.engine import Engine
from petals_server.execution.packing import packing_of
from petals_server.execution.states import EncodedStates
from petals_server.graphs import Graph, GraphStore
from petals_server.loading import ServedModel
from petals_server.repacking import Repacking
from petals_server.training import BackwardWork, KeptGraph, TrainingForwardWork, TrainingRequest
from petals_server.tuning_sessions import TuningSessions


class TrainingRequests:
    """Computes what clients ask for while they train. Belongs to one event loop."""

    def __init__(self, *, model: ServedModel, engine: Engine, limits: ServerLimits, max_turn_tokens: int) -> None:
        self.sessions = TuningSessions(engine=engine, limits=limits)
        """Matrices that clients train."""
        self.graphs = GraphStore(budget_bytes=limits.max_graph_bytes, lifetime_s=limits.max_graph_s)
        self.weights = Repacking(packing_of(model.span), model.threads, engine=engine, graphs=self.graphs)
        """Their form."""
        self._model = model
        self._engine = engine
        self._limits = limits
        self._max_turn_tokens = max_turn_tokens
        self._sweep: asyncio.TimerHandle | None = None

    async def forward(
        self, peer_id: PeerId, request: Forward, message: Message, span: Span, *, arrived_s: float
    ) -> tuple[TrainingForwardWork, tuple[EncodedStates, ...], bool]:
        """Compute a forward; returns the work, its result, and whether its graph is kept.

        Raises:
            PetalsError: the request is at fault, or can't be served.
        """
        checked = self._with_adapters(peer_id, request, check_forward(request, message, span), span)
        graph = None if request.graph_id is None else Graph(peer_id=peer_id)
        deadline_s = arrived_s + request.deadline_ms / 1000
        work = TrainingForwardWork(
            span,
            self._model.threads,
            checked,
            graph=graph,
            store=self.graphs,
            deadline_s=deadline_s,
            max_turn_tokens=self._max_turn_tokens,
            peer_id=peer_id,
        )
        if graph is None or request.graph_id is None:
            return work, await self._engine.compute(work), False
        async with self.weights.unpacked(deadline_s=deadline_s):
            try:
                result = await self._engine.compute(work)
            except BaseException:
                self.graphs.drop(graph)
                raise
            if work.graph is None:
                return work, result, False
            self.graphs.keep(request.graph_id, work.graph, now_s=time.monotonic())
            self._schedule_sweep(self._limits.max_graph_s)
            return work, result, True

    async def backward(
        self, peer_id: PeerId, request: Backward, message: Message, span: Span, *, arrived_s: float
    ) -> tuple[BackwardWork, tuple[EncodedStates, ...]]:
        """Compute a backward; returns the work and its result.

        Raises:
            GraphExpiredError: the graph that the request names is gone.
            PetalsError: the request is at fault, or can't be served.
        """
        graph: Graph | None = None
        if request.graph_id is not None:
            checked = check_backward_of_graph(request, message, span)
            graph = self.graphs.take(peer_id, request.graph_id, now_s=time.monotonic())
            if graph is None:
                raise GraphExpiredError("the graph of this forward is gone: send the inputs along")
        else:
            checked = self._with_adapters(peer_id, request, check_backward(request, message, span), span)
        try:
            kept = None if graph is None else graph.content
            assert kept is None or isinstance(kept, KeptGraph)
            if kept is not None and not kept.is_of(span, checked.row_tokens):
                raise InvalidRequestError("the graph that the backward names is of another forward")
            deadline_s = arrived_s + request.deadline_ms / 1000
            work = BackwardWork(
                span,
                self._model.threads,
                checked,
                graph=kept,
                max_graph_bytes=self._limits.max_graph_bytes,
                deadline_s=deadline_s,
                max_turn_tokens=self._max_turn_tokens,
                peer_id=peer_id,
            )
            del kept
            async with self.weights.unpacked(deadline_s=deadline_s):
                return work, await self._engine.compute(work)
        finally:
            if graph is not None:
                self.graphs.drop(graph)

    def _with_adapters(
        self, peer_id: PeerId, request: Forward | Backward, checked: TrainingRequest, span: Span
    ) -> TrainingRequest:
        """What changes the blocks; raises if the server does not have it."""
        adapter, tuning = request.active_adapter, request.tuning
        return replace(
            checked,
            adapter=None if adapter is None else find_adapter(self._model.adapters, adapter),
            tuning=None if tuning is None else self.sessions.find(peer_id, tuning, span),
        )

    def find_session_adapters(self, peer_id: PeerId, request: OpenSession, span: Span) -> tuple[Adapter, ...]:
        """What changes the blocks for a session, as it is now.

        Raises:
            MissingAdapterError, TuningExpiredError: the server does not have it.
        """
        adapters: list[Adapter] = []
        if request.active_adapter is not None:
            adapters.append(find_adapter(self._model.adapters, request.active_adapter))
        if request.tuning is not None:
            adapters.append(self.sessions.find(peer_id, request.tuning, span).adapter)
        return tuple(adapters)

    def _schedule_sweep(self, delay_s: float) -> None:
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(delay_s, self._drop_expired)

    def _drop_expired(self) -> None:
        self._sweep = None
        now_s = time.monotonic()
        next_s = self.graphs.drop_expired(now_s=now_s)
        if next_s is not None:
            self._schedule_sweep(next_s - now_s)
        self.weights.look(now_s)

    async def close(self) -> None:
        """Do nothing more by itself: the engine is going to be closed. Idempotent."""
        if self._sweep is not None:
            self._sweep.cancel()
        await self.weights.close()


def is_for_training(request: Forward) -> bool:
    """Whether a forward is more than whole rows through the model as it is."""
    return (
        len(request.tensors) > 1
        or request.graph_id is not None
        or request.active_adapter is not None
        or request.tuning is not None
    )


# --- checks -----------------------------------------------------------------------------------------------------------


def check_forward(request: Forward, message: Message, span: Span) -> TrainingRequest:
    """A forward with prompts, or whose graph is to be kept; raises ``InvalidRequestError`` if anything does not fit."""
    hidden, *prompts = _read_tensors(request.tensors, message, ("hidden states", "prompts"), num_required=1)
    _check_states(hidden, request.row_tokens, span, "hidden states")
    return _checked(request, span, hidden=hidden, prompts=prompts[0] if prompts else None)


def check_backward(request: Backward, message: Message, span: Span) -> TrainingRequest:
    """A backward that brings its inputs along; raises ``InvalidRequestError`` if anything does not fit."""
    names = ("gradient", "hidden states", "prompts")
    gradient, hidden, *prompts = _read_tensors(request.tensors, message, names, num_required=2)
    _check_states(gradient, request.row_tokens, span, "a gradient")
    _check_states(hidden, request.row_tokens, span, "hidden states")
    return _checked(request, span, hidden=hidden, prompts=prompts[0] if prompts else None, gradient=gradient)


def check_backward_of_graph(request: Backward, message: Message, span: Span) -> TrainingRequest:
    """A backward of a kept graph; raises ``InvalidRequestError`` if anything does not fit."""
    (gradient,) = _read_tensors(request.tensors, message, ("gradient",), num_required=1)
    _check_states(gradient, request.row_tokens, span, "a gradient")
    return _checked(request, span, hidden=None, prompts=None, gradient=gradient)


def _checked(
    request: Forward | Backward,
    span: Span,
    *,
    hidden: EncodedTensor | None,
    prompts: EncodedTensor | None,
    gradient: EncodedTensor | None = None,
) -> TrainingRequest:
    row_tokens = request.row_tokens
    if min(row_tokens) == 0:
        raise InvalidRequestError("a row without tokens has no gradient: leave it out")
    if prompts is not None:
        check_prompts(prompts.spec, span, num_rows=len(row_tokens), shortest_row=min(row_tokens))
    runs = request.position_runs
    if runs is not None and [sum(count for _, count in row) for row in runs] != list(row_tokens):
        raise InvalidRequestError("position_runs do not give one position to each token of each row")
    return TrainingRequest(row_tokens=row_tokens, position_runs=runs, hidden=hidden, prompts=prompts, gradient=gradient)


def read_session_prompts(request: OpenSession, message: Message, span: Span) -> SessionPrompts | None:
    """The deep prompts of a session, if it has any; raises ``InvalidRequestError`` if they do not fit."""
    if not request.tensors:
        return None
    (prompts,) = _read_tensors(request.tensors, message, ("prompts",), num_required=1)
    check_prompts(prompts.spec, span, num_rows=1, shortest_row=request.max_length)
    return SessionPrompts(span, prompts)


def check_prompts(spec: TensorSpec, span: Span, *, num_rows: int, shortest_row: int) -> None:
    """Raises ``InvalidRequestError`` if deep prompts do not fit the blocks or the rows."""
    shape = spec.shape
    num_blocks = span.end - span.start
    if len(shape) != 4 or shape[0] != num_blocks or shape[1] not in (1, num_rows) or shape[3] != span.hidden_size:
        raise InvalidRequestError(
            f"deep prompts of shape {list(shape)} where {num_blocks} blocks of width {span.hidden_size} and "
            f"{num_rows} rows ask for [{num_blocks}, 1 or {num_rows}, tokens, {span.hidden_size}]"
        )
    if not 0 < shape[2] <= shortest_row:
        raise InvalidRequestError(f"deep prompts of {shape[2]} tokens for a row that has {shortest_row}")


def _read_tensors(
    descriptions: Sequence[object], message: Message, names: Sequence[str], *, num_required: int
) -> list[EncodedTensor]:
    """The tensors of a message, of the given number, whose payload is as long as their descriptions say."""
    if not num_required <= len(descriptions) <= len(names):
        raise InvalidRequestError(f"{len(descriptions)} tensors where {', '.join(names)} are expected")
    payload = message.received_payload
    offset = 0
    tensors = []
    for name, description in zip(names, descriptions, strict=False):
        try:
            spec = TensorSpec.from_wire(description)
        except ProtocolError as error:
            raise InvalidRequestError(f"{name}: {error.message}") from None
        if spec.dtype not in DTYPES:
            raise InvalidRequestError(f"{name} of {spec.dtype} are no floating-point numbers")
        tensors.append(EncodedTensor(spec=spec, payload=payload[offset : offset + spec.num_bytes]))
        offset += spec.num_bytes
    if offset != payload.nbytes:
        raise InvalidRequestError(f"tensors of {offset} bytes came with {payload.nbytes}")
    return tensors


def _check_states(tensor: EncodedTensor, row_tokens: Sequence[int], span: Span, name: str) -> None:
    expected = (sum(row_tokens), span.hidden_size)
    if tensor.spec.shape != expected:
        raise InvalidRequestError(
            f"{name} of shape {list(tensor.spec.shape)} where row_tokens and the model ask for {list(expected)}"
        )
