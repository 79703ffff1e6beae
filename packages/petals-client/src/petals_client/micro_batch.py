"""One micro-batch on its way through servers, forward and back; when one fails, others take its place.

Letters: R rows, B blocks, P prompt tokens of a row, H hidden size.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.attempts import Attempts, Plan
from petals_client.chunks import Part
from petals_client.liveness import attend
from petals_client.session import read_states
from petals_client.swarm import Swarm
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import GraphExpiredError, PeerConnectionError, PetalsError, ProtocolError
from petals_core.identity import PeerId
from petals_core.net.rpc import call
from petals_core.routing.graph import Hop
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

REQUESTS_PER_SERVER: Final = 2
"""One computes while the next is on its way."""

GradientsOfPart = tuple[Tensor, Tensor | None, Tensor | None]
"""Of a micro-batch's hidden states, prompts, and values of the client's own matrices."""


@dataclass(slots=True, kw_only=True)
class Leg:
    """What one server did of a micro-batch."""

    hop: Hop
    graph_id: bytes | None
    """Under which name the server keeps the graph; None: it does not, or the graph is used up."""
    has_input: bool = True
    """Whether the client has what went into it; not where states went around the ring."""


class Access:
    """The servers, as one forward or backward of a batch uses them. Belongs to one event loop."""

    def __init__(self, swarm: Swarm, *, keeps_graphs: bool, adaptation: Adaptation | None = None) -> None:
        """Without graphs hidden states may travel in a lossy encoding, if the client's options say so."""
        self.swarm = swarm
        self.adaptation = adaptation
        self.keeps_graphs = keeps_graphs
        codec = None if keeps_graphs else swarm.options.activation_codec
        self.activation_encoding = None if codec is None else Encoding(codec)
        encoding = swarm.options.gradient_encoding
        self.gradient_encoding = None if encoding is None else Encoding(encoding)
        self._turns: dict[PeerId, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(REQUESTS_PER_SERVER))

    async def call(
        self,
        server: SignedAnnouncement,
        request: Forward | Backward,
        payload: Sequence[Buffer],
        reply: type[ForwardResult] | type[BackwardResult],
    ) -> tuple[Message, float]:
        """Send a request when it is its turn: more at once would share the server's link and all come late.

        Returns the reply and how long it took from its turn on, in seconds.

        Raises:
            PetalsError: the server could not be reached, or failed.
        """

        async def send(fields: dict[str, Any]) -> tuple[Message, float]:
            started_s = time.perf_counter()
            answer = call(
                connection,
                replace(request, **fields),
                payload,
                reply=reply,
                priority=Priority.BULK,
                timeout_s=self.swarm.options.step_timeout_s,
            )
            message = await attend(answer, connection, drop=self.swarm.drop)
            return message, time.perf_counter() - started_s

        async with self._turns[server.peer_id]:
            connection = await self.swarm.connect(server)
            if isinstance(request, Backward) and request.graph_id is not None:
                return await send({})  # a kept graph knows what changed its blocks
            return await self.swarm.tuning.request(server, request.start, request.end, self.adaptation, send)

    async def find_server(self, hop: Hop) -> SignedAnnouncement:
        """The announcement of a server that was used before.

        Raises:
            PeerConnectionError: it is not there any more.
        """
        signed = (await self.swarm.directory.servers()).get(hop.peer_id)
        if signed is None:
            raise PeerConnectionError("it is not announced any more")
        return signed


class MicroBatch:
    """Some rows on their way through blocks ``start:end``."""

    def __init__(self, access: Access, part: Part, prompts: Tensor | None, *, start: int) -> None:
        self._access = access
        self._part = part
        self._prompts = prompts
        """[B, 1 or R, P, H], for the blocks from ``start`` on and the part's rows."""
        self._start = start
        adaptation = access.adaptation
        self._tuned = None if adaptation is None else adaptation.tuned
        self._attempts = Attempts(access.swarm, None if adaptation is None else adaptation.adapter)

    async def forward(
        self,
        hidden: Tensor,
        start: int,
        end: int,
        *,
        plan: Plan | None = None,
    ) -> tuple[Tensor, list[tuple[Leg, Tensor]]]:
        """Compute blocks ``start:end``; returns what comes out, and, for a backward, what went into each server.

        When a server fails, others go on from the states before it. ``plan`` is tried first.

        Raises:
            PetalsError: nobody could do it.
        """
        output, legs = await self._forward(hidden, start, end, plan)
        self._attempts.end()
        return output, legs

    async def _forward(
        self, hidden: Tensor, start: int, end: int, plan: Plan | None = None
    ) -> tuple[Tensor, list[tuple[Leg, Tensor]]]:
        legs: list[tuple[Leg, Tensor]] = []
        position = start
        while position < end:
            chain, servers = plan or await self._attempts.plan(position, end)
            plan = None
            for hop in chain:
                graph_id = os.urandom(GRAPH_ID_BYTES) if self._access.keeps_graphs else None
                try:
                    output, is_kept = await self._forward_hop(hop, servers[hop.peer_id], hidden, graph_id)
                except PetalsError as error:
                    await self._attempts.note(hop, error)
                    break
                if self._access.keeps_graphs:
                    legs.append((Leg(hop=hop, graph_id=graph_id if is_kept else None), hidden))
                hidden = output
                position = hop.end
        return hidden, legs

    async def backward(self, legs: Sequence[tuple[Leg, Tensor | None]], gradient: Tensor) -> GradientsOfPart:
        """Return the gradients of the hidden states that went in, of the prompts, and of the client's own matrices.

        When a server fails, others compute its blocks again from what went into it; where only the chain's first
        server's input is known, all before it are computed again too.

        Raises:
            PetalsError: nobody could do it.
        """
        remaining: list[tuple[Leg, Tensor | None]] = list(legs)
        of_prompts: list[Tensor] = []
        of_values: list[Tensor] = []
        while remaining:
            leg, hidden = remaining[-1]
            try:
                gradient, prompts, values = await self._backward_hop(leg, hidden, gradient)
            except PetalsError as error:
                has_expired = isinstance(error, GraphExpiredError)  # nobody's fault
                if not has_expired and await self._attempts.note(leg.hop, error):
                    continue
                end = leg.hop.end
                while hidden is None:
                    remaining.pop()
                    leg, hidden = remaining[-1]
                remaining.pop()
                _, others = await self._forward(hidden, leg.hop.start, end)
                remaining.extend(others)
                continue
            remaining.pop()
            if prompts is not None:
                of_prompts.append(prompts)
            if values is not None:
                of_values.append(values)
        self._attempts.end()
        # The last blocks came first.
        return (
            gradient,
            torch.cat(of_prompts[::-1]) if of_prompts else None,
            torch.cat(of_values[::-1]) if of_values else None,
        )

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _forward_hop(
        self, hop: Hop, server: SignedAnnouncement, hidden: Tensor, graph_id: bytes | None
    ) -> tuple[Tensor, bool]:
        spec, payload = encode(hidden, encoding=self._access.activation_encoding)
        prompt_specs, prompt_payload = _encode_all(self._prompts_of(hop))
        request = Forward(
            fingerprint=self._access.swarm.fingerprint,
            start=hop.start,
            end=hop.end,
            row_tokens=self._part.row_tokens,
            position_runs=self._part.position_runs,
            tensors=tuple(each.to_wire() for each in (spec, *prompt_specs)),
            deadline_ms=int(self._access.swarm.options.step_timeout_s * 1000),
            graph_id=graph_id,
        )
        reply, took_s = await self._access.call(server, request, [*payload, *prompt_payload], ForwardResult)
        assert isinstance(reply.body, ForwardResult)
        states = read_states(reply, reply.body.tensors, spec)
        self._access.swarm.contribution.note(server, hop, hidden.shape[0])
        # Before it the server may compute another of our requests.
        self._access.swarm.praise_work(
            server,
            hop,
            num_tokens=REQUESTS_PER_SERVER * hidden.shape[0],
            took_s=took_s,
            spare_s=self._access.swarm.round_trip_s(hop.peer_id) or 0.0,
        )
        (received,) = states.payload
        return decode(states.spec, memoryview(received)), reply.body.is_kept is True

    async def _backward_hop(self, leg: Leg, hidden: Tensor | None, gradient: Tensor) -> GradientsOfPart:
        server = await self._access.find_server(leg.hop)
        graph_id, leg.graph_id = leg.graph_id, None
        if graph_id is not None:
            try:
                return await self._request_backward(leg.hop, server, [], gradient, graph_id)
            except GraphExpiredError:
                if hidden is None:
                    raise
        if hidden is None:
            raise GraphExpiredError("the graph is used up")
        return await self._request_backward(leg.hop, server, [hidden, *self._prompts_of(leg.hop)], gradient, None)

    async def _request_backward(
        self, hop: Hop, server: SignedAnnouncement, inputs: Sequence[Tensor], gradient: Tensor, graph_id: bytes | None
    ) -> GradientsOfPart:
        gradient_spec, gradient_payload = encode(gradient, encoding=self._access.gradient_encoding)
        specs, payload = _encode_all(inputs)
        request = Backward(
            fingerprint=self._access.swarm.fingerprint,
            start=hop.start,
            end=hop.end,
            row_tokens=self._part.row_tokens,
            position_runs=self._part.position_runs,
            tensors=tuple(spec.to_wire() for spec in (gradient_spec, *specs)),
            deadline_ms=int(self._access.swarm.options.step_timeout_s * 1000),
            graph_id=graph_id,
        )
        reply, _ = await self._access.call(server, request, [*gradient_payload, *payload], BackwardResult)
        assert isinstance(reply.body, BackwardResult)
        self._access.swarm.contribution.note(server, hop, gradient.shape[0])
        prompts = self._prompts_of(hop)
        expected = [(tuple(each.shape), gradient_spec.dtype) for each in (gradient, *prompts)]
        values = None if self._tuned is None else self._tuned.values[self._tuned.layout.place(hop.start, hop.end)]
        if values is not None and len(values):
            expected.append((tuple(values.shape), str(values.dtype).removeprefix("torch.")))
        results = iter(_read_gradients(reply, reply.body.tensors, expected))
        return (
            next(results),
            next(results) if prompts else None,
            next(results, None) if values is None or len(values) else values,
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
    message: Message, descriptions: Sequence[object], expected: Sequence[tuple[tuple[int, ...], str]]
) -> list[Tensor]:
    """The gradients of a reply; raises ``ProtocolError`` unless their shapes and dtype are those of what went in."""
    if len(descriptions) != len(expected):
        raise ProtocolError(f"the server answered with {len(descriptions)} gradients instead of {len(expected)}")
    payload = message.received_payload
    gradients = []
    offset = 0
    for description, (shape, dtype) in zip(descriptions, expected, strict=True):
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
