"""A session through a chain of servers, opened, stepped, and mended when one of them fails."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

from petals_client.chain import StepRequest
from petals_client.routing.graph import Chain, Hop
from petals_client.session import HopSession, States
from petals_client.swarm import Swarm, explain_failure
from petals_client.trace import HopTrace, StepTrace
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import Disposition, InvalidRequestError, MissingBlocksError, PetalsError
from petals_core.identity import PeerId
from petals_core.wire.messages import SESSION_ID_BYTES, OpenSession

_MAX_TRACES = 1024


class SwarmSession:
    """The attention cache of one batch, spread over the servers of a chain. Belongs to one event loop."""

    def __init__(self, swarm: Swarm, *, start: int, end: int, num_rows: int, max_length: int) -> None:
        self._swarm = swarm
        self._start = start
        self._end = end
        self._num_rows = num_rows
        self._max_length = max_length
        self._hops: list[HopSession] = []
        self._is_closed = False
        self.traces: deque[StepTrace] = deque(maxlen=_MAX_TRACES)
        """Of the last steps."""

    @property
    def chain(self) -> Chain:
        """The servers that serve it."""
        return tuple(session.hop for session in self._hops)

    async def open(self) -> None:
        """Plan a chain and open the session on each of its servers; on failure nothing is left open.

        Raises:
            PetalsError: no chain could be opened.
        """
        self._hops = await self._open_hops(self._start, self._end, failed=set())

    async def step(self, requests: Sequence[tuple[StepRequest, States]]) -> list[States]:
        """Run the parts of one step through the chain, all under way at once; return what comes out of each.

        Raises:
            PetalsError: a server failed. The session must then be closed.
        """
        started_s = asyncio.get_running_loop().time()
        hops: list[HopTrace] = []
        if len(requests) == 1:
            results = [await self._pass(*requests[0], hops)]
        else:
            tasks = [asyncio.create_task(self._pass(*request, hops)) for request in requests]
            try:
                results = list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        self.traces.append(
            StepTrace(
                num_tokens=sum(states.spec.shape[0] for _, states in requests),
                total_s=asyncio.get_running_loop().time() - started_s,
                hops=tuple(hops),
            )
        )
        return results

    async def _pass(self, request: StepRequest, states: States, traces: list[HopTrace]) -> States:
        """Carry states from server to server."""
        for session in self._hops:
            try:
                states, trace = await session.step(request, states, timeout_s=self._swarm.options.step_timeout_s)
            except PetalsError as error:
                if self._is_closed:
                    raise InvalidRequestError("the session was closed while a step was under way") from None
                self._swarm.blame(session.hop.peer_id, error)
                raise explain_failure(session.hop, error) from error
            traces.append(trace)
        return states

    def close(self) -> None:
        """Free the caches on all servers; never blocks, idempotent."""
        self._is_closed = True
        hops, self._hops = self._hops, []
        for session in hops:
            session.close()

    # --- opening ------------------------------------------------------------------------------------------------------

    async def _open_hops(self, start: int, end: int, *, failed: set[PeerId]) -> list[HopSession]:
        options = self._swarm.options
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + options.open_timeout_s
        failure: PetalsError | None = None
        attempt = 0
        while True:
            attempt += 1
            try:
                chain, servers = await self._swarm.plan(
                    start, end, without=failed, cache_tokens=self._num_rows * self._max_length
                )
            except MissingBlocksError:
                if failure is None:
                    raise
                raise failure from None

            timeout_s = max(0.1, deadline_s - loop.time())
            results = await _gather_all(
                [self._open_hop(hop, servers[hop.peer_id], timeout_s=timeout_s) for hop in chain]
            )
            opened = [result for result in results if isinstance(result, HopSession)]
            if len(opened) == len(chain):
                return opened
            for session in opened:
                session.close()
            wait_s = 0.0
            for hop, result in zip(chain, results, strict=True):
                if not isinstance(result, PetalsError):
                    continue
                self._swarm.blame(hop.peer_id, result)
                failure = explain_failure(hop, result)
                if result.disposition is Disposition.GIVE_UP:
                    raise failure from result
                if result.disposition is Disposition.GO_ELSEWHERE:
                    failed.add(hop.peer_id)
                else:
                    # Full: the penalty sends the next plan elsewhere if there is an elsewhere.
                    wait_s = max(wait_s, min(result.retry_after_s or 0.5, 5.0))
            assert failure is not None
            if loop.time() + wait_s >= deadline_s or (not wait_s and attempt >= options.max_attempts):
                raise failure
            await asyncio.sleep(wait_s)

    async def _open_hop(self, hop: Hop, server: SignedAnnouncement, *, timeout_s: float) -> HopSession:
        connection = await self._swarm.connect(server)
        request = OpenSession(
            session_id=os.urandom(SESSION_ID_BYTES),
            fingerprint=self._swarm.fingerprint,
            start=hop.start,
            end=hop.end,
            num_rows=self._num_rows,
            max_length=self._max_length,
            deadline_ms=int(timeout_s * 1000),
        )
        return await HopSession.open(connection, hop, request, timeout_s=timeout_s)


async def _gather_all(coroutines: Sequence[Coroutine[Any, Any, HopSession]]) -> list[HopSession | PetalsError]:
    """Run all to their end; when cancelled, close what was opened."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled() and task.exception() is None:
                task.result().close()
        raise
    results: list[HopSession | PetalsError] = []
    for task in tasks:
        error = task.exception()
        if error is None:
            results.append(task.result())
        elif isinstance(error, PetalsError):
            results.append(error)
        else:
            raise error
    return results
