"""A session through a chain of servers, opened, stepped, and mended when one of them fails."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.chain import StepRequest
from petals_client.history import merge_steps
from petals_client.session import HopSession, States, join_states
from petals_client.swarm import Swarm, explain_failure
from petals_client.trace import HopTrace, StepTrace
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import (
    CacheLostError,
    Disposition,
    InvalidRequestError,
    MissingBlocksError,
    PeerConnectionError,
    PetalsError,
    RemoteFailureError,
)
from petals_core.identity import PeerId
from petals_core.routing.graph import Chain, Hop
from petals_core.tensors.codec import encode
from petals_core.wire.messages import SESSION_ID_BYTES, Buffer, OpenSession

_logger = logging.getLogger(__name__)
_MAX_TRACES = 1024
_MAX_REFUSALS = 8
"""Times that a step waits for a server that is full for the moment."""
_MAX_WAIT_S = 5.0


class SwarmSession:
    """The attention cache of one batch, spread over the servers of a chain. Belongs to one event loop."""

    def __init__(
        self,
        swarm: Swarm,
        *,
        start: int,
        end: int,
        num_rows: int,
        max_length: int,
        prompts: Tensor | None = None,
        adaptation: Adaptation | None = None,
    ) -> None:
        """``prompts`` [end - start, 1, P, H] are deep prompts."""
        self._swarm = swarm
        self._start = start
        self._end = end
        self._num_rows = num_rows
        self._max_length = max_length
        self._prompts = prompts
        self._adaptation = adaptation
        self._hops: list[HopSession] = []
        self._is_closed = False
        self._failures: list[tuple[PeerId, PetalsError]] = []
        """Of the step under way."""
        self._num_refusals = 0
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

    async def step(self, parts: Sequence[tuple[StepRequest, States]]) -> list[States]:
        """Run the parts of one step through the chain, all under way at once; return what comes out of each.

        When a server fails, others are brought to where it was and take its place.

        Raises:
            PetalsError: a server failed and could not be replaced. The session must then be closed.
        """
        started_s = time.perf_counter()  # uvloop's clock counts milliseconds
        self._failures.clear()
        self._num_refusals = 0
        traces: list[HopTrace] = []
        if len(parts) == 1:
            results = [await self._run_part(*parts[0], traces)]
        else:
            results = await self._run_parts(parts, traces)
        self.traces.append(
            StepTrace(
                num_tokens=sum(states.spec.shape[0] for _, states in parts),
                total_s=time.perf_counter() - started_s,
                hops=tuple(traces),
            )
        )
        return results

    async def _run_part(self, request: StepRequest, states: States, traces: list[HopTrace]) -> States:
        """Carry states from server to server, and go on from where one fails."""
        timeout_s = self._swarm.options.step_timeout_s
        index = 0
        while index < len(self._hops):
            session = self._hops[index]
            try:
                output, trace = await session.step(request, states, timeout_s=timeout_s)
            except PetalsError as error:
                await self._mend(session, error)
                continue
            session.history.append(request, states, states.spec.num_bytes)
            traces.append(trace)
            states = output
            index += 1
        return states

    async def _run_parts(self, parts: Sequence[tuple[StepRequest, States]], traces: list[HopTrace]) -> list[States]:
        """Let parts follow each other through the chain, so that servers work at the same time."""
        timeout_s = self._swarm.options.step_timeout_s
        failures: list[tuple[HopSession, PetalsError]] = []

        async def run(request: StepRequest, states: States) -> tuple[list[tuple[HopSession, States]], States]:
            passed = []
            for session in self._hops:
                try:
                    output, trace = await session.step(request, states, timeout_s=timeout_s)
                except PetalsError as error:
                    failures.append((session, error))
                    raise
                passed.append((session, states))
                traces.append(trace)
                states = output
            return passed, states

        while True:
            tasks = [asyncio.create_task(run(*part)) for part in parts]
            try:
                outcomes = await asyncio.gather(*tasks)
            except PetalsError:
                pass
            else:
                break
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            session, error = failures[0]
            if parts[0][0].row_order is not None:
                # Some servers have changed the order of their rows already, and would do it again.
                raise explain_failure(session.hop, error)
            await self._mend(session, error)
            for each in [each for each in self._hops if each.num_under_way]:
                await self._mend(each, None)
            failures.clear()
            traces.clear()
        for (request, _), (passed, _) in zip(parts, outcomes, strict=True):
            for session, states in passed:
                session.history.append(request, states, states.spec.num_bytes)
        return [states for _, states in outcomes]

    # --- mending ------------------------------------------------------------------------------------------------------

    async def _mend(self, broken: HopSession, error: PetalsError | None) -> None:
        """Put others in the place of a server that failed, in the state that it was in.

        Without an ``error`` the server is not at fault, and may take its own place.

        Raises:
            PetalsError: the request itself is at fault, too little was kept, or there is nobody else.
        """
        if self._is_closed:
            raise InvalidRequestError("the session was closed while a step was under way")
        if isinstance(error, CacheLostError):
            self._num_refusals += 1
            if self._num_refusals <= _MAX_REFUSALS:
                error = None  # it made room for others, and may be asked for it again
        if error is not None and error.disposition is Disposition.RETRY_SAME and broken.num_under_way == 1:
            self._num_refusals += 1
            if self._num_refusals <= _MAX_REFUSALS:
                broken.num_under_way = 0  # refused before it began: nothing has changed there
                await asyncio.sleep(min(error.retry_after_s or 0.5, _MAX_WAIT_S))
                return
        failure = None if error is None else self._note(broken.hop, error)
        broken.close()
        if not broken.history.is_complete:
            raise failure or RemoteFailureError("the session is too long to be rebuilt: open another one")
        steps = merge_steps(broken.history.steps, join_states, self._swarm.options.max_tokens_per_request)
        replacement: list[HopSession] | None = None
        while replacement is None:
            if failure is not None and len(self._failures) >= self._swarm.options.max_attempts:
                raise failure
            try:
                opened = await self._open_hops(broken.hop.start, broken.hop.end, failed=self._excluded())
            except MissingBlocksError as missing:
                raise failure or missing from None
            try:
                culprit = await self._replay(steps, opened)
                if culprit is None:
                    replacement, opened = opened, []
                else:
                    failure = self._note(*culprit)
            finally:
                for session in opened:
                    session.close()
        _logger.info(
            "server %s is replaced by %s",
            broken.hop.peer_id.short,
            ", ".join(session.hop.peer_id.short for session in replacement),
        )
        if self._is_closed:
            for session in replacement:
                session.close()
            return
        index = self._hops.index(broken)
        self._hops[index : index + 1] = replacement

    async def _replay(
        self, steps: Sequence[tuple[StepRequest, States]], sessions: Sequence[HopSession]
    ) -> tuple[Hop, PetalsError] | None:
        """Send what a server was sent to those that replace it; return who failed, if anybody did."""
        for request, states in steps:
            for session in sessions:
                try:
                    output, _ = await session.step(request, states, timeout_s=self._swarm.options.step_timeout_s)
                except PetalsError as error:
                    return session.hop, error
                session.history.append(request, states, states.spec.num_bytes)
                states = output
        return None

    def _note(self, hop: Hop, error: PetalsError) -> PetalsError:
        """Note whose fault a failure was, and say so; raises the explanation if it is our own."""
        failure = explain_failure(hop, error)
        if error.disposition is Disposition.GIVE_UP:
            raise failure from error
        self._swarm.blame(hop.peer_id, error)
        self._failures.append((hop.peer_id, error))
        return failure

    def _excluded(self) -> set[PeerId]:
        """Servers that this step asks no more. A cut connection may happen once to everybody."""
        peers = [peer_id for peer_id, _ in self._failures]
        return {
            peer_id
            for peer_id, error in self._failures
            if not isinstance(error, PeerConnectionError) or peers.count(peer_id) > 1
        }

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
                    start,
                    end,
                    without=failed,
                    cache_tokens=self._num_rows * self._max_length,
                    adapter=None if self._adaptation is None else self._adaptation.adapter,
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
                    wait_s = max(wait_s, min(result.retry_after_s or 0.5, _MAX_WAIT_S))
            assert failure is not None
            if loop.time() + wait_s >= deadline_s or (not wait_s and attempt >= options.max_attempts):
                raise failure
            await asyncio.sleep(wait_s)

    async def _open_hop(self, hop: Hop, server: SignedAnnouncement, *, timeout_s: float) -> HopSession:
        connection = await self._swarm.connect(server)
        tensors: tuple[Any, ...] | None = None
        payload: Sequence[Buffer] = ()
        if self._prompts is not None:
            spec, payload = encode(self._prompts[hop.start - self._start : hop.end - self._start])
            tensors = (spec.to_wire(),)
        request = OpenSession(
            session_id=os.urandom(SESSION_ID_BYTES),
            fingerprint=self._swarm.fingerprint,
            start=hop.start,
            end=hop.end,
            num_rows=self._num_rows,
            max_length=self._max_length,
            deadline_ms=int(timeout_s * 1000),
            tensors=tensors,
        )

        async def send(fields: dict[str, Any]) -> HopSession:
            return await HopSession.open(
                connection,
                hop,
                replace(request, **fields),
                payload,
                timeout_s=timeout_s,
                history_bytes=self._swarm.options.history_bytes,
            )

        return await self._swarm.tuning.request(server, hop.start, hop.end, self._adaptation, send)


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
