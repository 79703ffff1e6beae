"""Forward passes with deep prompts or for a later backward, and backward passes.

Letters: R rows, T tokens of all rows together, N columns of a chunk, B blocks, P prompt tokens of a row, H hidden size,
V values of low-rank matrices.
"""

# ruff: noqa: N806 -- tensors are named by their shape

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray

from petals_core.identity import PeerId
from petals_core.models.low_rank import Adapter
from petals_core.models.span import Span
from petals_core.tensors.codec import Encoding, TensorSpec, encode
from petals_server.adapters import Part, adapted
from petals_server.columns import Chunk, PositionRuns, expand_positions, take_rows
from petals_server.deep_prompts import EncodedTensor
from petals_server.differentiation import ChunkGraph, GraphMeter, OverBudgetError, checkpointed, compute_rows
from petals_server.execution import packing
from petals_server.execution.states import EncodedStates
from petals_server.graphs import Graph, GraphStore
from petals_server.scheduling.request import Urgency
from petals_server.threads import ThreadPlan
from petals_server.tuning_sessions import TuningValues
from petals_server.work import Work

_FEW_TOKENS: Final = 64
"""The event loop itself encodes results of so many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRequest:
    """What a forward or backward request asks for; no row is empty, and none is shorter than the prompts."""

    row_tokens: tuple[int, ...]
    position_runs: PositionRuns | None
    hidden: EncodedTensor | None
    """What goes into the first block [T, H]; None: it is in a kept graph."""
    prompts: EncodedTensor | None = None
    """[B, 1 or R, P, H]"""
    gradient: EncodedTensor | None = None
    """With respect to what comes out of the last block [T, H]; None in a forward."""
    adapter: Adapter | None = None
    """A loaded one."""
    tuning: TuningValues | None = None
    """The client's own, whose gradient it wants."""


# --- requests ---------------------------------------------------------------------------------------------------------


class _TrainingWork(Work[tuple[EncodedStates, ...]]):
    """What forward and backward share: a request's tensors, cut into chunks of rows."""

    def __init__(
        self,
        span: Span,
        threads: ThreadPlan,
        request: TrainingRequest,
        *,
        deadline_s: float,
        max_turn_tokens: int,
        peer_id: PeerId | None,
    ) -> None:
        super().__init__(
            urgency=Urgency.TRAINING,
            num_tokens=sum(request.row_tokens),
            deadline_s=deadline_s,
            peer_id=peer_id,
            max_turn_tokens=max_turn_tokens,
        )
        self.span = span
        self.threads = threads
        self.request = request
        self._next_row = 0
        self.is_prompt_shared = request.prompts is not None and request.prompts.spec.shape[1] == 1
        """Whether all rows have the same prompts."""
        self.hidden_TH: torch.Tensor | None = None
        self.prompts_BRPH: torch.Tensor | None = None
        self.positions_T: NDArray[np.int64] | None = None
        tuning = request.tuning
        self._values_V = None if tuning is None else tuning.values_V.detach().requires_grad_()
        self._tuned = None if tuning is None or self._values_V is None else tuning.layout.split(self._values_V)

    @property
    def is_heavy(self) -> bool:
        return self.num_tokens > _FEW_TOKENS

    def decode_inputs(self) -> None:
        """Decode the payloads; raises ``ProtocolError``."""
        request = self.request
        if request.hidden is not None:
            self.hidden_TH = request.hidden.decode(self.span)
        if request.prompts is not None:
            self.prompts_BRPH = request.prompts.decode(self.span)
        if request.position_runs is not None:
            self.positions_T = np.concatenate([expand_positions(runs) for runs in request.position_runs])

    def next_chunk(self, num_tokens: int) -> Chunk:
        """The rows that are next: as many as have so many tokens, but at least one, which can't be cut."""
        taken = take_rows(self.request.row_tokens, self._next_row, num_tokens, is_whole=self.span.is_recurrent)
        assert taken is not None
        return taken[0]

    def pass_chunk(self, chunk: Chunk) -> bool:
        """Note that a chunk is computed; True if it was the last one."""
        self._next_row += len(chunk.row_tokens)
        self.num_done += sum(chunk.row_tokens)
        return self._next_row == len(self.request.row_tokens)

    def tokens(self, chunk: Chunk) -> slice:
        """Where a chunk's tokens stand among those of the request: no row is empty, so they are neighbours."""
        return slice(chunk.row_starts[0], chunk.row_starts[0] + sum(chunk.row_tokens))

    def prompts_of(self, chunk: Chunk) -> torch.Tensor | None:
        """The prompts of a chunk's rows [B, 1 or its R, P, H]."""
        prompts = self.prompts_BRPH
        if prompts is None or prompts.shape[1] == 1:
            return prompts
        return prompts[:, self._next_row : self._next_row + len(chunk.row_tokens)]

    def run(self, chunk: Chunk, *, with_graph: bool) -> ChunkGraph:
        """Compute a chunk; raises what saving a tensor of its graph raises."""
        assert self.hidden_TH is not None
        hidden_TH = self.hidden_TH[self.tokens(chunk)]
        prompts_BRPH = self.prompts_of(chunk)
        if with_graph:
            hidden_TH = hidden_TH.detach().requires_grad_()
            prompts_BRPH = None if prompts_BRPH is None else prompts_BRPH.detach().requires_grad_()
        values_V = self._values_V
        positions_T = None if self.positions_T is None else self.positions_T[self.tokens(chunk)]
        with torch.set_grad_enabled(with_graph), self.changed():
            output_TH = compute_rows(self.span, chunk.row_tokens, hidden_TH, prompts_BRPH, positions_T)
        return ChunkGraph(hidden_TH=hidden_TH, prompts_BRPH=prompts_BRPH, values_V=values_V, output_TH=output_TH)

    def changed(self) -> AbstractContextManager[None]:
        """The span as the request's adapters change it. Also around what computes blocks again."""
        parts: list[Part] = []
        if self.request.adapter is not None:
            parts.append((self.request.adapter, None))
        if self._tuned is not None:
            parts.append((self._tuned, None))
        return adapted(self.span, parts)

    @property
    def others_own(self) -> list[torch.Tensor]:
        """What the request uses and is in memory anyway."""
        return [] if self.request.adapter is None else list(self.request.adapter.tensors)


@final
class TrainingForwardWork(_TrainingWork):
    """Whole rows through the span, with prompts, and with the graph kept where there is room for it."""

    def __init__(
        self,
        span: Span,
        threads: ThreadPlan,
        request: TrainingRequest,
        *,
        graph: Graph | None,
        store: GraphStore,
        deadline_s: float,
        max_turn_tokens: int,
        peer_id: PeerId | None = None,
    ) -> None:
        super().__init__(
            span, threads, request, deadline_s=deadline_s, max_turn_tokens=max_turn_tokens, peer_id=peer_id
        )
        self.graph = graph
        """What is to be kept; None: nothing, or not any more."""
        self._store = store
        self._meter: GraphMeter | None = None
        self._parts: list[tuple[Chunk, ChunkGraph]] = []
        self._outputs: list[torch.Tensor] = []

    def advance(self, num_tokens: int) -> bool:
        self.threads.apply(self.urgency)
        if self.num_done == 0:
            self.decode_inputs()
            self._begin_graph()
        chunk = self.next_chunk(num_tokens)
        part: ChunkGraph | None = None
        if self._meter is not None:
            try:
                with self._meter:
                    part = self.run(chunk, with_graph=True)
                self._meter.count(part.output_TH)
                self._parts.append((chunk, part))
            except OverBudgetError:
                self._give_up_graph()
        if part is None:
            part = self.run(chunk, with_graph=False)
        self._outputs.append(part.output_TH.detach())
        if not self.pass_chunk(chunk):
            return False
        if self.graph is not None:
            self.graph.content = KeptGraph(
                start=self.span.start,
                end=self.span.end,
                row_tokens=self.request.row_tokens,
                is_prompt_shared=self.is_prompt_shared,
                values_dtype=None if self.request.tuning is None else self.request.tuning.dtype,
                parts=tuple(self._parts),
            )
        return True

    def _begin_graph(self) -> None:
        graph, store = self.graph, self._store
        if graph is not None:
            packing.unpack(self.span)
            self._meter = GraphMeter(
                self.span, lambda num_bytes: store.grow(graph, num_bytes), others_own=self.others_own
            )

    def _give_up_graph(self) -> None:
        """Keep nothing of this request."""
        self._meter = None
        self._parts.clear()
        if self.graph is not None:
            self._store.drop(self.graph)
            self.graph = None

    def result(self) -> tuple[EncodedStates, ...]:
        assert self.request.hidden is not None
        output_TH = self._outputs[0] if len(self._outputs) == 1 else torch.cat(self._outputs)
        return (encode_like(output_TH, self.request.hidden.spec),)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptGraph:
    """The content of a ``Graph``."""

    start: int
    end: int
    row_tokens: tuple[int, ...]
    is_prompt_shared: bool
    values_dtype: torch.dtype | None
    """What the gradient of the client's matrices is to be in; None: there are none."""
    parts: tuple[tuple[Chunk, ChunkGraph], ...]
    """Backward goes by the chunks of the forward."""

    def is_of(self, span: Span, row_tokens: Sequence[int]) -> bool:
        """Whether it is of these blocks and as many tokens."""
        return (self.start, self.end, self.row_tokens) == (span.start, span.end, tuple(row_tokens))


@final
class BackwardWork(_TrainingWork):
    """Gradients of what went into the span: from a kept graph, or computed with a forward of its own."""

    def __init__(
        self,
        span: Span,
        threads: ThreadPlan,
        request: TrainingRequest,
        *,
        graph: KeptGraph | None,
        max_graph_bytes: int,
        deadline_s: float,
        max_turn_tokens: int,
        peer_id: PeerId | None = None,
    ) -> None:
        """``max_graph_bytes``: a chunk whose graph would take more is computed block by block."""
        super().__init__(
            span, threads, request, deadline_s=deadline_s, max_turn_tokens=max_turn_tokens, peer_id=peer_id
        )
        if graph is not None:
            self.is_prompt_shared = graph.is_prompt_shared
        self._graph = graph
        self._max_graph_bytes = max_graph_bytes
        self._gradient_TH: torch.Tensor
        self._gradients: list[torch.Tensor] = []
        self._prompt_gradients: list[torch.Tensor] = []
        self._values_gradient_V: torch.Tensor | None = None
        self._values_dtype = None if request.tuning is None else request.tuning.dtype
        if graph is not None:
            self._values_dtype = graph.values_dtype

    def advance(self, num_tokens: int) -> bool:
        self.threads.apply(self.urgency)
        if self.num_done == 0:
            self.decode_inputs()
            packing.unpack(self.span)
            assert self.request.gradient is not None
            self._gradient_TH = self.request.gradient.decode(self.span)
        if self._graph is None:
            chunk = self.next_chunk(num_tokens)
            part = self._forward(chunk)
        else:
            chunk, part = self._graph.parts[len(self._gradients)]
        with self.changed():  # a checkpointed chunk computes its blocks again
            gradients = part.differentiate(self._gradient_TH[self.tokens(chunk)])
        self._gradients.append(gradients.hidden_TH)
        if gradients.prompts_BRPH is not None:
            self._prompt_gradients.append(gradients.prompts_BRPH)
        if (of_values_V := gradients.values_V) is not None:
            before_V = self._values_gradient_V
            self._values_gradient_V = of_values_V if before_V is None else before_V + of_values_V
        if not self.pass_chunk(chunk):
            return False
        self._graph = None
        return True

    def _forward(self, chunk: Chunk) -> ChunkGraph:
        num_bytes = 0

        def grow(more: int) -> bool:
            nonlocal num_bytes
            num_bytes += more
            return num_bytes <= self._max_graph_bytes

        try:
            with GraphMeter(self.span, grow, others_own=self.others_own):
                return self.run(chunk, with_graph=True)
        except OverBudgetError:
            with checkpointed(self.span):
                return self.run(chunk, with_graph=True)

    def result(self) -> tuple[EncodedStates, ...]:
        assert self.request.gradient is not None
        like = self.request.gradient.spec
        results = [encode_like(torch.cat(self._gradients), like)]
        if self._prompt_gradients:
            of_prompts = (
                torch.stack(self._prompt_gradients).sum(dim=0)
                if self.is_prompt_shared
                else torch.cat(self._prompt_gradients, dim=1)
            )
            results.append(encode_like(of_prompts, like))
        if self._values_gradient_V is not None:
            # Exactly, however other gradients travel: one row has no scales of its own to be rounded by.
            spec, buffers = encode(self._values_gradient_V.to(self._values_dtype))
            results.append(EncodedStates(spec=spec, buffers=buffers))
        return tuple(results)


def encode_like(tensor: torch.Tensor, like: TensorSpec) -> EncodedStates:
    """A tensor as the client sent its own: logical dtype and encoding are the same."""
    spec, buffers = encode(tensor.to(getattr(torch, like.dtype)), encoding=Encoding(like.encoding))
    return EncodedStates(spec=spec, buffers=buffers)
