"""Forwards around the ring of a chain's servers.

Micro-batches follow each other as steps of a session. Each begins it anew, so the attention cache holds one of them at
most, and everything else is what a session has: servers pass states on among themselves, a window bounds what is under
way, and failed servers are replaced. Where gradients will be wanted there is no cache, servers keep the graph of each
step, and the first failure ends it, after which states are carried.

Letters: N tokens of all rows, H hidden size.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.chain import StepRequest
from petals_client.chunks import Part, split_columns, split_rows
from petals_client.micro_batch import Leg
from petals_client.packing import PositionRuns
from petals_client.part_states import decode_states, encode_states, join_parts, take_part
from petals_client.swarm import Servers, Swarm
from petals_client.swarm_session import SwarmSession
from petals_client.window import choose_batch_sizes, choose_batch_tokens, choose_join_tokens
from petals_core.errors import PetalsError
from petals_core.routing.flow import Branch
from petals_core.tensors.codec import encode
from petals_core.tensors.states import States

_logger = logging.getLogger(__name__)
_MIN_PARTS_PER_SERVER = 2
"""With fewer parts, opening the session takes more time than the ring saves, unless there are many bytes."""
_MANY_BYTES = 128 * 1024
"""Of states: a connection that was idle needs four round trips for them (RFC 6928), and the client's link would carry
them twice for each server. Waiting for room in a cache would cost more than that saves."""

_OPEN_TIMEOUT_S = 2.0
"""Beyond it, states that are carried are there earlier: servers without room let a session wait."""


class RingForward:
    """One forward of a batch through the chains that were planned for it. Belongs to one event loop."""

    def __init__(
        self,
        swarm: Swarm,
        branches: Sequence[Branch],
        servers: Servers,
        *,
        start: int,
        end: int,
        adaptation: Adaptation | None,
        keeps_graphs: bool = False,
    ) -> None:
        self._swarm = swarm
        self._branches = branches
        self._servers = servers
        self._start = start
        self._end = end
        self._adaptation = adaptation
        self._keeps_graphs = keeps_graphs
        self.legs: list[tuple[Part, tuple[Leg, ...]]] = []
        """For each micro-batch, where graphs are kept, who keeps them."""

    async def run(
        self, hidden: Tensor, row_tokens: tuple[int, ...], position_runs: PositionRuns | None
    ) -> Tensor | None:
        """Compute packed states [N, H]; None where it does not pay or no session is to be had: carry them instead."""
        num_hops = max(len(branch.chain) for branch in self._branches)
        max_tokens = self._choose_part_tokens(hidden, num_hops)
        micro_batches = split_rows(row_tokens, position_runs, max_tokens)
        num_rows = max(len(each.row_tokens) for each in micro_batches)
        if num_hops == 1 or not self._pays(hidden, micro_batches, max_tokens, cache_tokens=num_rows * max(row_tokens)):
            return None
        output = torch.empty_like(hidden)
        todo = deque(micro_batches)

        async def serve(branch: Branch) -> None:
            session = SwarmSession(
                self._swarm,
                start=self._start,
                end=self._end,
                num_rows=num_rows,
                max_length=max(row_tokens),
                adaptation=self._adaptation,
                keeps_graphs=self._keeps_graphs,
            )
            try:
                async with asyncio.timeout(_OPEN_TIMEOUT_S):
                    await session.open((branch.chain, self._servers))
                while taken := self._take_turn(todo, branch.share):
                    if self._keeps_graphs:
                        await self._step_with_graphs(session, hidden, output, taken)
                    else:
                        await self._step(session, hidden, output, taken, num_rows)
            finally:
                session.close()

        tasks = [asyncio.create_task(serve(branch)) for branch in self._branches]
        try:
            await asyncio.gather(*tasks)
        except (PetalsError, TimeoutError) as error:
            _logger.info("a batch does not go around the ring, so this client carries its states: %s", error)
            return None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        return output

    def _pays(self, hidden: Tensor, micro_batches: Sequence[Part], max_tokens: int, *, cache_tokens: int) -> bool:
        """Whether the ring saves more time than opening sessions takes."""
        num_servers = sum(len(branch.chain) for branch in self._branches)
        if self._keeps_graphs:  # a row can't be cut
            return len(micro_batches) >= _MIN_PARTS_PER_SERVER * num_servers
        num_parts = sum(math.ceil(sum(each.row_tokens) / max_tokens) for each in micro_batches)
        if num_parts >= _MIN_PARTS_PER_SERVER * num_servers:
            return True
        if hidden.nbytes < _MANY_BYTES:
            return False
        hops = [hop for branch in self._branches for hop in branch.chain]
        room = [self._swarm.cache_tokens_left(self._servers[hop.peer_id]) for hop in hops]
        return all(left is None or left >= cache_tokens for left in room)

    def _choose_part_tokens(self, hidden: Tensor, num_hops: int) -> int:
        options = self._swarm.options
        wanted = options.micro_batch_tokens or min(
            choose_batch_tokens(
                hidden.shape[0],
                num_hops,
                token_bytes=hidden.shape[1] * hidden.element_size(),
                link_bytes_per_s=self._swarm.rate_bytes_per_s(branch.chain[0].peer_id),
            )
            for branch in self._branches
        )
        return min(wanted, options.max_tokens_per_request, options.max_tokens_in_flight)

    def _take_turn(self, todo: deque[Part], share: float) -> list[Part]:
        """The next micro-batches of one chain: all it may have under way, but less towards the end, so that chains end
        together."""
        if not todo:
            return []
        num_tokens = self._swarm.options.max_tokens_in_flight // len(self._branches)
        if len(self._branches) > 1:
            num_tokens = min(num_tokens, math.ceil(share * sum(sum(each.row_tokens) for each in todo) / 2))
        taken = [todo.popleft()]
        num_tokens -= sum(taken[0].row_tokens)
        while todo and sum(todo[0].row_tokens) <= num_tokens:
            num_tokens -= sum(todo[0].row_tokens)
            taken.append(todo.popleft())
        return taken

    async def _step_with_graphs(
        self, session: SwarmSession, hidden: Tensor, output: Tensor, micro_batches: Sequence[Part]
    ) -> None:
        """Send micro-batches through a session whose servers keep their graphs; nothing is lost by an encoding."""
        inputs, places = [], []
        for each in micro_batches:
            place = slice(each.ranges[0][0], each.ranges[0][0] + sum(each.row_tokens))
            request = StepRequest(keep=0, row_tokens=each.row_tokens, position_runs=each.position_runs)
            spec, payload = encode(hidden[place])
            inputs.append((request, States(spec=spec, payload=payload)))
            places.append(place)
        first = session.next_number
        for place, states in zip(places, await session.step(inputs), strict=True):
            output[place] = decode_states(states)
        for number, each in enumerate(micro_batches, first):
            legs = [
                Leg(hop=hop, graph_id=graph_id, has_input=index == 0)
                for index, (hop, graph_id) in enumerate(session.graph_ids(number))
            ]
            self.legs.append((each, tuple(legs)))

    async def _step(
        self,
        session: SwarmSession,
        hidden: Tensor,
        output: Tensor,
        micro_batches: Sequence[Part],
        num_rows: int,
    ) -> None:
        """Send micro-batches through a session, and put what comes out where they stand in the whole."""
        options, rate = self._swarm.options, session.rate_bytes_per_s
        token_bytes, num_hops = hidden.shape[1] * hidden.element_size(), len(session.chain)
        num_tokens = [sum(each.row_tokens) for each in micro_batches]
        sizes = choose_batch_sizes(
            num_tokens,
            num_hops,
            max_tokens=options.max_tokens_per_request,
            part_tokens=options.micro_batch_tokens,
            token_bytes=token_bytes,
            link_bytes_per_s=rate,
        )
        join_tokens = None
        if options.micro_batch_tokens is None:
            join_tokens = min(options.max_tokens_per_request, choose_join_tokens(sum(num_tokens), num_hops))
        inputs = []
        places: list[tuple[int, int, list[tuple[StepRequest, Part]]]] = []
        for each, sizes_of_parts in zip(micro_batches, sizes, strict=True):
            first, count = each.ranges[0][0], sum(each.row_tokens)
            missing = num_rows - len(each.row_tokens)
            runs = each.position_runs
            request = StepRequest(
                keep=0,
                row_tokens=each.row_tokens + (0,) * missing,
                position_runs=None if runs is None else runs + ((),) * missing,
                join_tokens=join_tokens,
            )
            tokens = hidden[first : first + count]
            steps = split_columns(request, *sizes_of_parts)
            inputs += [(step, encode_states(take_part(tokens, part), options, rate)) for step, part in steps]
            places.append((first, count, steps))
        results = iter(await session.step(inputs))
        for first, count, parts in places:
            states = [next(results) for _ in parts]
            output[first : first + count] = join_parts(hidden[first : first + count], parts, states)
