"""Forward and backward of remote blocks for training: micro-batches through one chain or several, mended on the way.

What a forward leaves behind is two things: a trace of plain values (which server computed what, and under which name it
may have kept its graph), and the hidden states that went into each server, which its caller keeps with the tensors of
the autograd graph. With these a backward can be done by the same servers or, if they are gone, by others.

Letters: N tokens of all rows, R rows, B blocks, P prompt tokens of a row, H hidden size.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from petals_client.chunks import Part, split_rows
from petals_client.packing import PositionRuns
from petals_client.session import read_states
from petals_client.swarm import Swarm, explain_failure
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import (
    Disposition,
    GraphExpiredError,
    MissingBlocksError,
    PeerConnectionError,
    PetalsError,
    ProtocolError,
)
from petals_core.identity import PeerId
from petals_core.net.rpc import call
from petals_core.routing.graph import Chain, Hop, find_gaps
from petals_core.tensors.codec import Encoding, TensorSpec, decode, encode
from petals_core.wire.frames import Priority
from petals_core.wire.messages import (
    GRAPH_ID_BYTES,
    Backward,
    BackwardResult,
    Buffer,
    Forward,
    ForwardResult,
    Message,
)

Plan = tuple[Chain, dict[PeerId, SignedAnnouncement]]
"""A chain, and what all servers announced."""

_REQUESTS_PER_SERVER: Final = 2
"""One computes while the next is on its way."""
_PARTS_PER_HOP: Final = 4
_MIN_PART_TOKENS: Final = 128
"""Smaller micro-batches cost more in computing than they save in waiting."""
_MAX_CHAINS: Final = 4
_MAX_WAIT_S: Final = 5.0


@dataclass(slots=True, kw_only=True)
class Leg:
    """What one server did of a micro-batch."""

    hop: Hop
    graph_id: bytes | None
    """Under which name the server keeps the graph; None: it does not, or the graph is used up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTrace:
    """One micro-batch's way through a chain."""

    part: Part
    legs: tuple[Leg, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTrace:
    """What a backward has to know of its forward."""

    start: int
    end: int
    parts: tuple[PartTrace, ...] = field(default=())


# --- one micro-batch --------------------------------------------------------------------------------------------------


class _Attempts:
    """Who failed a micro-batch so far, and what is done about it."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._failures: list[tuple[PeerId, PetalsError, PetalsError]] = []

    async def plan(self, start: int, end: int) -> Plan:
        """A chain without those that failed; raises the last failure if there is none."""
        try:
            return await self._swarm.plan(start, end, without=self._excluded())
        except MissingBlocksError as missing:
            raise (self._failures[-1][2] if self._failures else missing) from None

    async def note(self, hop: Hop, error: PetalsError) -> None:
        """Note a failure, and wait where the server asks for it; raises it if it is the last."""
        self._swarm.blame(hop.peer_id, error)
        failure = explain_failure(hop, error)
        self._failures.append((hop.peer_id, error, failure))
        if error.disposition is Disposition.GIVE_UP or len(self._failures) >= self._swarm.options.max_attempts:
            raise failure from error
        if error.disposition is Disposition.RETRY_SAME:
            await asyncio.sleep(min(error.retry_after_s or 0.5, _MAX_WAIT_S))

    def _excluded(self) -> set[PeerId]:
        """Servers that are asked no more. A cut connection may happen once to everybody."""
        peers = [peer_id for peer_id, _, _ in self._failures]
        return {
            peer_id
            for peer_id, error, _ in self._failures
            if error.disposition is not Disposition.RETRY_SAME
            and (not isinstance(error, PeerConnectionError) or peers.count(peer_id) > 1)
        }


class _MicroBatch:
    """Some rows on their way through blocks ``start:end``."""

    def __init__(self, run: TrainingRun, part: Part, prompts: Tensor | None, *, start: int) -> None:
        self._run = run
        self._part = part
        self._prompts = prompts
        """[B, 1 or R, P, H], for the blocks from ``start`` on and the part's rows."""
        self._start = start
        self._attempts = _Attempts(run.swarm)

    async def forward(
        self,
        hidden: Tensor,
        start: int,
        end: int,
        *,
        plan: Plan | None = None,
    ) -> tuple[Tensor, list[tuple[Leg, Tensor]]]:
        """Compute blocks ``start:end``; returns what comes out, and what went into each server.

        When a server fails, others go on from the states before it. ``plan`` is tried first.

        Raises:
            PetalsError: nobody could do it.
        """
        legs: list[tuple[Leg, Tensor]] = []
        position = start
        while position < end:
            chain, servers = plan or await self._attempts.plan(position, end)
            plan = None
            for hop in chain:
                graph_id = os.urandom(GRAPH_ID_BYTES) if self._run.keeps_graphs else None
                try:
                    output, is_kept = await self._forward_hop(hop, servers[hop.peer_id], hidden, graph_id)
                except PetalsError as error:
                    await self._attempts.note(hop, error)
                    break
                self._run.swarm.praise(hop.peer_id)
                legs.append((Leg(hop=hop, graph_id=graph_id if is_kept else None), hidden))
                hidden = output
                position = hop.end
        return hidden, legs

    async def backward(self, legs: Sequence[tuple[Leg, Tensor]], gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the hidden states that went in, and of the prompts.

        When a server fails, others compute its blocks again from what went into it.

        Raises:
            PetalsError: nobody could do it.
        """
        remaining = list(legs)
        of_prompts: list[Tensor] = []
        while remaining:
            leg, hidden = remaining[-1]
            try:
                gradient, of_hop = await self._backward_hop(leg, hidden, gradient)
            except PetalsError as error:
                await self._attempts.note(leg.hop, error)
                if error.disposition is not Disposition.RETRY_SAME:
                    remaining.pop()
                    _, others = await self.forward(hidden, leg.hop.start, leg.hop.end)
                    remaining.extend(others)
                continue
            remaining.pop()
            if of_hop is not None:
                of_prompts.append(of_hop)
        if self._prompts is None:
            return gradient, None
        of_prompts.reverse()
        return gradient, torch.cat(of_prompts)

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _forward_hop(
        self, hop: Hop, server: SignedAnnouncement, hidden: Tensor, graph_id: bytes | None
    ) -> tuple[Tensor, bool]:
        specs, payload = _encode_all([hidden, *self._prompts_of(hop)])
        request = Forward(
            fingerprint=self._run.swarm.fingerprint,
            start=hop.start,
            end=hop.end,
            row_tokens=self._part.row_tokens,
            position_runs=self._part.position_runs,
            tensors=tuple(spec.to_wire() for spec in specs),
            deadline_ms=int(self._run.swarm.options.step_timeout_s * 1000),
            graph_id=graph_id,
        )
        reply = await self._call(server, request, payload, ForwardResult)
        assert isinstance(reply.body, ForwardResult)
        states = read_states(reply, reply.body.tensors, specs[0])
        (received,) = states.payload
        return decode(states.spec, memoryview(received)), reply.body.is_kept is True

    async def _backward_hop(self, leg: Leg, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        server = await self._run.find_server(leg.hop)
        graph_id, leg.graph_id = leg.graph_id, None
        if graph_id is not None:
            try:
                return await self._request_backward(leg.hop, server, [], gradient, graph_id)
            except GraphExpiredError:
                pass  # it is computed anew
        return await self._request_backward(leg.hop, server, [hidden, *self._prompts_of(leg.hop)], gradient, None)

    async def _request_backward(
        self, hop: Hop, server: SignedAnnouncement, inputs: Sequence[Tensor], gradient: Tensor, graph_id: bytes | None
    ) -> tuple[Tensor, Tensor | None]:
        gradient_spec, gradient_payload = encode(gradient, encoding=self._run.gradient_encoding)
        specs, payload = _encode_all(inputs)
        request = Backward(
            fingerprint=self._run.swarm.fingerprint,
            start=hop.start,
            end=hop.end,
            row_tokens=self._part.row_tokens,
            position_runs=self._part.position_runs,
            tensors=tuple(spec.to_wire() for spec in (gradient_spec, *specs)),
            deadline_ms=int(self._run.swarm.options.step_timeout_s * 1000),
            graph_id=graph_id,
        )
        reply = await self._call(server, request, [*gradient_payload, *payload], BackwardResult)
        assert isinstance(reply.body, BackwardResult)
        prompts = self._prompts_of(hop)
        expected = [tuple(gradient.shape), *(tuple(each.shape) for each in prompts)]
        results = _read_gradients(reply, reply.body.tensors, expected, gradient_spec.dtype)
        return results[0], results[1] if prompts else None

    async def _call(
        self,
        server: SignedAnnouncement,
        request: Forward | Backward,
        payload: Sequence[Buffer],
        reply: type[ForwardResult] | type[BackwardResult],
    ) -> Message:
        async with self._run.turn_at(server.peer_id):
            connection = await self._run.swarm.connect(server)
            return await call(
                connection,
                request,
                payload,
                reply=reply,
                priority=Priority.BULK,
                timeout_s=self._run.swarm.options.step_timeout_s,
            )

    def _prompts_of(self, hop: Hop) -> list[Tensor]:
        """The prompts of a server's blocks, if there are any."""
        if self._prompts is None:
            return []
        return [self._prompts[hop.start - self._start : hop.end - self._start]]


def _encode_all(tensors: Sequence[Tensor]) -> tuple[list[TensorSpec], list[Buffer]]:
    specs: list[TensorSpec] = []
    payload: list[Buffer] = []
    for tensor in tensors:
        spec, buffers = encode(tensor)
        specs.append(spec)
        payload.extend(buffers)
    return specs, payload


def _read_gradients(
    message: Message, descriptions: Sequence[object], expected: Sequence[tuple[int, ...]], dtype: str
) -> list[Tensor]:
    """The gradients of a reply; raises ``ProtocolError`` unless their shapes and dtype are those of what went in."""
    if len(descriptions) != len(expected):
        raise ProtocolError(f"the server answered with {len(descriptions)} gradients instead of {len(expected)}")
    payload = message.received_payload
    gradients = []
    offset = 0
    for description, shape in zip(descriptions, expected, strict=True):
        spec = TensorSpec.from_wire(description)
        if spec.shape != shape or spec.dtype != dtype:
            raise ProtocolError(
                f"the server answered with a gradient {spec.dtype}{list(spec.shape)} of {dtype}{list(shape)}"
            )
        gradients.append(decode(spec, payload[offset : offset + spec.num_bytes]))
        offset += spec.num_bytes
    if offset != payload.nbytes:
        raise ProtocolError(f"the server announced {offset} bytes of gradients and sent {payload.nbytes}")
    return gradients


# --- all of a batch ---------------------------------------------------------------------------------------------------


class TrainingRun:
    """One forward or one backward of a batch. Belongs to one event loop.

    Micro-batches follow each other through a chain, so that its servers work at the same time, and go through further
    chains at once where the swarm has them.
    """

    def __init__(self, swarm: Swarm, *, keeps_graphs: bool) -> None:
        self.swarm = swarm
        self.keeps_graphs = keeps_graphs
        encoding = swarm.options.gradient_encoding
        self.gradient_encoding = None if encoding is None else Encoding(encoding)
        self._turns: dict[PeerId, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(_REQUESTS_PER_SERVER))
        self._tokens_left = swarm.options.max_tokens_in_flight
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def forward(
        self,
        hidden: Tensor,
        prompts: Tensor | None,
        *,
        start: int,
        end: int,
        row_tokens: tuple[int, ...],
        position_runs: PositionRuns | None,
    ) -> tuple[Tensor, TrainingTrace, list[Tensor]]:
        """Compute packed states [N, H]; returns what comes out, its trace, and what went into each server.

        Raises:
            PetalsError: no chain could do it.
        """
        plans = await self._plan_chains(start, end, num_tokens=hidden.shape[0])
        max_tokens = self._choose_part_tokens(hidden.shape[0], num_hops=sum(len(chain) for chain, _ in plans))
        parts = split_rows(row_tokens, position_runs, max_tokens)
        results: list[tuple[Tensor, list[tuple[Leg, Tensor]]] | None] = [None] * len(parts)
        todo = deque(enumerate(parts))

        async def serve(plan: Plan) -> None:
            """Take the next micro-batch as soon as the chain can begin one: the faster one takes more."""
            while todo:
                index, part = todo.popleft()
                async with self._in_flight(sum(part.row_tokens)):
                    micro_batch = _MicroBatch(self, part, _rows_of(prompts, part), start=start)
                    results[index] = await micro_batch.forward(_take(hidden, part), start, end, plan=plan)

        await _run_all(
            [serve(plan) for plan in plans for _ in range(min(len(parts), _REQUESTS_PER_SERVER * len(plan[0])))]
        )
        output = torch.empty_like(hidden)
        traces = []
        inputs: list[Tensor] = []
        for part, result in zip(parts, results, strict=True):
            assert result is not None
            states, legs = result
            _put(output, part, states)
            traces.append(PartTrace(part=part, legs=tuple(leg for leg, _ in legs)))
            inputs.extend(states for _, states in legs)
        return output, TrainingTrace(start=start, end=end, parts=tuple(traces)), inputs

    async def backward(
        self, trace: TrainingTrace, inputs: Sequence[Tensor], prompts: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of what went into ``forward``, from that of what came out [N, H].

        Raises:
            PetalsError: no chain could do it.
        """
        states = iter(inputs)
        legs_of = [[(leg, next(states)) for leg in each.legs] for each in trace.parts]
        results: list[tuple[Tensor, Tensor | None] | None] = [None] * len(trace.parts)

        async def run(index: int) -> None:
            part = trace.parts[index].part
            async with self._in_flight(sum(part.row_tokens)):
                micro_batch = _MicroBatch(self, part, _rows_of(prompts, part), start=trace.start)
                results[index] = await micro_batch.backward(legs_of[index], _take(gradient, part))

        await _run_all([run(index) for index in range(len(trace.parts))])
        of_hidden = torch.zeros_like(gradient)
        of_prompts = None if prompts is None else torch.zeros_like(prompts)
        for each, result in zip(trace.parts, results, strict=True):
            assert result is not None
            _put(of_hidden, each.part, result[0])
            if of_prompts is not None:
                rows = _rows_of(of_prompts, each.part)
                assert rows is not None
                assert result[1] is not None
                rows += result[1]
        return of_hidden, of_prompts

    # --- sharing the way ----------------------------------------------------------------------------------------------

    async def _plan_chains(self, start: int, end: int, *, num_tokens: int) -> list[Plan]:
        """The best chain and, for a batch that can be divided, the best of those servers that are left, and so on."""
        chain, servers = await self.swarm.plan(start, end)
        plans: list[Plan] = [(chain, servers)]
        used = {hop.peer_id for hop in chain}
        while len(plans) < min(_MAX_CHAINS, num_tokens // _MIN_PART_TOKENS):
            left = [each.announcement for peer_id, each in servers.items() if peer_id not in used]
            if find_gaps(((each.start, each.end) for each in left), start, end):
                break
            chain, servers = await self.swarm.plan(start, end, without=used)
            plans.append((chain, servers))
            used |= {hop.peer_id for hop in chain}
        return plans

    def _choose_part_tokens(self, num_tokens: int, *, num_hops: int) -> int:
        options = self.swarm.options
        wanted = options.micro_batch_tokens
        if wanted is None:
            wanted = num_tokens if num_hops == 1 else -(-num_tokens // (_PARTS_PER_HOP * num_hops))
            wanted = max(wanted, _MIN_PART_TOKENS)
        return max(1, min(wanted, options.max_tokens_per_request, options.max_tokens_in_flight))

    @asynccontextmanager
    async def _in_flight(self, num_tokens: int) -> AsyncIterator[None]:
        """Wait until so many tokens more may be under way. A row that is longer than all goes alone."""
        num_tokens = min(num_tokens, self.swarm.options.max_tokens_in_flight)
        if self._waiting or num_tokens > self._tokens_left:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((num_tokens, turn))
            await turn
        else:
            self._tokens_left -= num_tokens
        try:
            yield
        finally:
            self._tokens_left += num_tokens
            while self._waiting and self._waiting[0][0] <= self._tokens_left:
                count, turn = self._waiting.popleft()
                if not turn.done():
                    self._tokens_left -= count
                    turn.set_result(None)

    def turn_at(self, peer_id: PeerId) -> asyncio.Semaphore:
        """Held while a request to a server is under way: more at once would share its link and all come late."""
        return self._turns[peer_id]

    async def find_server(self, hop: Hop) -> SignedAnnouncement:
        """The announcement of a server that was used before.

        Raises:
            PeerConnectionError: it is not there any more.
        """
        for signed in await self.swarm.directory.servers():
            if signed.peer_id == hop.peer_id:
                return signed
        raise PeerConnectionError("it is not announced any more")


def _take(tokens: Tensor, part: Part) -> Tensor:
    """A part's tokens: its rows are neighbours, and none is empty."""
    first = part.ranges[0][0]
    return tokens[first : first + sum(part.row_tokens)]


def _put(output: Tensor, part: Part, tokens: Tensor) -> None:
    _take(output, part).copy_(tokens)


def _rows_of(prompts: Tensor | None, part: Part) -> Tensor | None:
    """The prompts [B, 1 or R, P, H] of a part's rows: a view."""
    if prompts is None or prompts.shape[1] == 1:
        return prompts
    return prompts[:, part.first_row : part.first_row + len(part.row_tokens)]


async def _run_all(coroutines: Sequence[Awaitable[None]]) -> None:
    """Run all to their end; with the first error the others are cancelled and have ended."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
