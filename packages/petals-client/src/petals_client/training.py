"""Forward and backward of batches through remote blocks: micro-batches through one chain or several, mended on the way.

What a forward leaves behind is two things: a trace of plain values (which server computed what, and under which name it
may have kept its graph), and the hidden states that went into each server, which its caller keeps with the tensors of
the autograd graph. With these a backward can be done by the same servers or, if they are gone, by others.

Letters: N tokens of all rows, R rows, B blocks, P prompt tokens of a row, H hidden size.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.chunks import Part, split_rows
from petals_client.micro_batch import REQUESTS_PER_SERVER, Access, GradientsOfPart, Leg, MicroBatch
from petals_client.packing import PositionRuns
from petals_client.ring_forward import RingForward
from petals_client.swarm import Servers, Swarm
from petals_core.errors import MissingBlocksError
from petals_core.routing.flow import Branch
from petals_core.routing.graph import Chain

_PARTS_PER_HOP: Final = 4
_MIN_PART_TOKENS: Final = 128
"""Smaller micro-batches cost more in computing than they save in waiting."""
_PLANNED_PART_TOKENS: Final = 512
"""Size of a micro-batch for which chains are compared."""
_MAX_CHAINS: Final = 4


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
    adaptation: Adaptation | None = None
    parts: tuple[PartTrace, ...] = field(default=())


class TrainingRun:
    """One forward or one backward of a batch. Belongs to one event loop.

    Micro-batches follow each other through a chain, so that its servers work at the same time, and go through further
    chains at once where the swarm has them.
    """

    def __init__(self, swarm: Swarm, *, keeps_graphs: bool, adaptation: Adaptation | None = None) -> None:
        self._swarm = swarm
        self._adaptation = adaptation
        self._access = Access(swarm, keeps_graphs=keeps_graphs, adaptation=adaptation)
        self._tokens_left = swarm.options.max_tokens_in_flight
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def _plan(
        self, start: int, end: int, *, num_tokens: int, max_chains: int
    ) -> tuple[tuple[Branch, ...], Servers]:
        """Chains for a batch; where servers have gone that were there before, this waits for others."""
        adapter = None if self._adaptation is None else self._adaptation.adapter
        deadline_s = asyncio.get_running_loop().time() + self._swarm.options.recovery_timeout_s
        while True:
            try:
                return await self._swarm.plan_batch(
                    start, end, num_tokens=num_tokens, max_chains=max_chains, adapter=adapter
                )
            except MissingBlocksError as missing:
                if not self._swarm.directory.were_held(start, end):
                    raise
                if not await self._swarm.wait_for_servers(missing, deadline_s=deadline_s):
                    raise

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

        States go around the ring if that pays; then only what went into the first server is known here.

        Raises:
            PetalsError: no chain could do it.
        """
        num_tokens = hidden.shape[0]
        part_tokens = self._swarm.options.micro_batch_tokens or _MIN_PART_TOKENS
        branches, servers = await self._plan(
            start,
            end,
            num_tokens=min(num_tokens, _PLANNED_PART_TOKENS),
            max_chains=max(1, min(_MAX_CHAINS, num_tokens // part_tokens)),
        )
        if prompts is None:
            around = RingForward(
                self._swarm,
                branches,
                servers,
                start=start,
                end=end,
                adaptation=self._adaptation,
                keeps_graphs=self._access.keeps_graphs,
            )
            output = await around.run(hidden, row_tokens, position_runs)
            if output is not None:
                parts_around = tuple(PartTrace(part=part, legs=legs) for part, legs in around.legs)
                trace = TrainingTrace(start=start, end=end, adaptation=self._adaptation, parts=parts_around)
                return output, trace, [_take(hidden, each.part) for each in parts_around]
        max_tokens = self._choose_part_tokens(num_tokens, num_hops=sum(len(branch.chain) for branch in branches))
        parts = split_rows(row_tokens, position_runs, max_tokens)
        results: list[tuple[Tensor, list[tuple[Leg, Tensor]]] | None] = [None] * len(parts)
        todo = deque(enumerate(parts))

        async def serve(chain: Chain) -> None:
            """Take the next micro-batch as soon as the chain can begin one: the faster one takes more."""
            while todo:
                index, part = todo.popleft()
                async with self._in_flight(sum(part.row_tokens)):
                    micro_batch = MicroBatch(self._access, part, _rows_of(prompts, part), start=start)
                    results[index] = await micro_batch.forward(_take(hidden, part), start, end, plan=(chain, servers))

        await _run_all([serve(chain) for chain in _divide(branches, len(parts))])
        output = torch.empty_like(hidden)
        traces = []
        inputs: list[Tensor] = []
        for part, result in zip(parts, results, strict=True):
            assert result is not None
            states, legs = result
            _put(output, part, states)
            traces.append(PartTrace(part=part, legs=tuple(leg for leg, _ in legs)))
            inputs.extend(states for _, states in legs)
        return output, TrainingTrace(start=start, end=end, adaptation=self._adaptation, parts=tuple(traces)), inputs

    async def backward(
        self, trace: TrainingTrace, inputs: Sequence[Tensor], prompts: Tensor | None, gradient: Tensor
    ) -> GradientsOfPart:
        """Return the gradients of what went into ``forward``, from that of what came out [N, H].

        Raises:
            PetalsError: no chain could do it.
        """
        states = iter(inputs)
        legs_of = [[(leg, next(states) if leg.has_input else None) for leg in each.legs] for each in trace.parts]
        results: list[GradientsOfPart | None] = [None] * len(trace.parts)

        async def run(index: int) -> None:
            part = trace.parts[index].part
            async with self._in_flight(sum(part.row_tokens)):
                micro_batch = MicroBatch(self._access, part, _rows_of(prompts, part), start=trace.start)
                results[index] = await micro_batch.backward(legs_of[index], _take(gradient, part))

        await _run_all([run(index) for index in range(len(trace.parts))])
        of_hidden = torch.zeros_like(gradient)
        of_prompts = None if prompts is None else torch.zeros_like(prompts)
        of_values: Tensor | None = None
        for each, result in zip(trace.parts, results, strict=True):
            assert result is not None
            _put(of_hidden, each.part, result[0])
            if of_prompts is not None:
                rows = _rows_of(of_prompts, each.part)
                assert rows is not None
                assert result[1] is not None
                rows += result[1]
            if result[2] is not None:
                of_values = result[2] if of_values is None else of_values + result[2]
        return of_hidden, of_prompts, of_values

    # --- sharing the way ----------------------------------------------------------------------------------------------

    def _choose_part_tokens(self, num_tokens: int, *, num_hops: int) -> int:
        options = self._swarm.options
        wanted = options.micro_batch_tokens
        if wanted is None:
            wanted = num_tokens if num_hops == 1 else -(-num_tokens // (_PARTS_PER_HOP * num_hops))
            wanted = max(wanted, _MIN_PART_TOKENS)
        return max(1, min(wanted, options.max_tokens_per_request, options.max_tokens_in_flight))

    @asynccontextmanager
    async def _in_flight(self, num_tokens: int) -> AsyncIterator[None]:
        """Wait until so many tokens more may be under way. A row that is longer than all goes alone."""
        num_tokens = min(num_tokens, self._swarm.options.max_tokens_in_flight)
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


def _divide(branches: Sequence[Branch], num_parts: int) -> list[Chain]:
    """A chain for each micro-batch that is under way at once, in proportion to the chains' shares at any number."""
    most = branches[0].share
    places = []
    for branch in branches:
        num_places = min(num_parts, math.ceil(REQUESTS_PER_SERVER * len(branch.chain) * branch.share / most))
        places += [((place + 0.5) / branch.share, branch.chain) for place in range(num_places)]
    places.sort(key=lambda place: place[0])
    return [chain for _, chain in places]


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
