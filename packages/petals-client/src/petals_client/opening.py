"""Sessions on the servers of a chain, opened together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.liveness import attend
from petals_client.objections import Objections
from petals_client.session import HopSession
from petals_client.swarm import Servers, Swarm, explain_end, explain_failure
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import (
    AuthenticationError,
    Disposition,
    MissingBlocksError,
    OverloadedError,
    PetalsError,
    VersionMismatchError,
)
from petals_core.identity import PeerId
from petals_core.routing.graph import Chain, Hop, describe_blocks
from petals_core.tensors.codec import encode
from petals_core.wire.messages import Buffer, OpenSession

_logger = logging.getLogger(__name__)
MAX_WAIT_S = 5.0
"""For a server that is full for the moment, before it is asked again."""
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.2, 2.0
"""Where nobody holds a block, between two look-ups; each is twice as long as the one before."""
_LASTING = (OverloadedError, AuthenticationError, VersionMismatchError)
"""After these a new session does not wait any longer: ``open`` has waited for room, and nothing changes who answers."""
_TELL_S = 5.0
"""Between two lines that tell the user of the waiting."""


class ChainOpener:
    """Opens what one session needs on servers. Belongs to one event loop."""

    def __init__(
        self,
        swarm: Swarm,
        *,
        start: int,
        num_rows: int,
        max_length: int,
        prompts: Tensor | None,
        adaptation: Adaptation | None,
        keeps_graphs: bool = False,
    ) -> None:
        """``prompts`` [blocks from ``start`` on, 1, P, H] are deep prompts."""
        self._swarm = swarm
        self._start = start
        self._num_rows = num_rows
        self._max_length = max_length
        self._prompts = prompts
        self._adaptation = adaptation
        self._keeps_graphs = keeps_graphs

    async def open(
        self,
        start: int,
        end: int,
        *,
        failed: set[PeerId],
        previous: PeerId | None = None,
        following: PeerId | None = None,
        is_urgent: bool = False,
        plan: tuple[Chain, Servers] | None = None,
    ) -> list[HopSession]:
        """Plan a chain over blocks ``start:end`` and open the session on each of its servers.

        On failure nothing is left open. Servers that fail are added to ``failed`` and not asked again; that the request
        is wrong is believed when two say so, or where there is nobody else (``objections.py``). For
        ``previous``, ``following`` and ``is_urgent`` see ``Swarm.plan``. With a ``plan`` that is tried first.

        Raises:
            PetalsError: no chain could be opened.
        """
        options = self._swarm.options
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + options.open_timeout_s
        failure: PetalsError | None = None
        objections = Objections()
        full: set[PeerId] = set()
        """Servers that have no room for the moment: asked again where there is nobody else."""
        wait_s = 0.0
        attempt = 0
        while True:
            attempt += 1
            try:
                chain, servers = (plan if attempt == 1 else None) or await self._swarm.plan(
                    start,
                    end,
                    without=failed | full | objections.peers,
                    cache_tokens=self._num_rows * self._max_length,
                    previous=previous,
                    following=following,
                    adapter=None if self._adaptation is None else self._adaptation.adapter,
                    is_urgent=is_urgent or attempt > 1,
                )
            except MissingBlocksError:
                if failure is None:
                    raise
                if not full or loop.time() + wait_s >= deadline_s:
                    raise objections.failure or failure from None
                await asyncio.sleep(wait_s)
                full.clear()
                wait_s = 0.0
                continue

            timeout_s = max(0.1, deadline_s - loop.time())
            results = await _gather_all(
                [self._open_hop(hop, servers[hop.peer_id], timeout_s=timeout_s) for hop in chain]
            )
            opened = [result for result in results if isinstance(result, HopSession)]
            if len(opened) == len(chain):
                if (refuted := objections.refuted()) is not None:
                    self._swarm.blame(*refuted)
                return opened
            for session in opened:
                session.close()
            for hop, result in zip(chain, results, strict=True):
                if not isinstance(result, PetalsError):
                    continue
                self._swarm.blame(hop.peer_id, result)
                failure = explain_failure(hop, result)
                if result.disposition is Disposition.GIVE_UP:
                    objections.note(hop.peer_id, result, failure)
                elif result.disposition is Disposition.GO_ELSEWHERE:
                    failed.add(hop.peer_id)
                else:
                    full.add(hop.peer_id)
                    wait_s = max(wait_s, min(result.retry_after_s or 0.5, MAX_WAIT_S))
            assert failure is not None
            if loop.time() >= deadline_s or (not full and attempt >= options.max_attempts):
                raise failure

    async def wait_and_open(
        self,
        start: int,
        end: int,
        *,
        failed: set[PeerId],
        deadline_s: float,
        previous: PeerId | None = None,
        following: PeerId | None = None,
        is_urgent: bool = True,
        plan: tuple[Chain, Servers] | None = None,
    ) -> list[HopSession]:
        """As ``open``, but wait for servers while none that holds some blocks works, and say so.

        Servers that have failed are asked again when there is nobody else. ``deadline_s`` is on the loop's clock. What
        is not urgent fails at once where nobody has held some blocks since this client joined, where servers had no
        room for as long as ``open`` waits for it, and where others than announced answer, or speak another version.

        Raises:
            PetalsError: no chain could be opened up to the deadline.
        """
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        told_s = started_s - _TELL_S
        pause_s = _FIRST_PAUSE_S
        failure: PetalsError | None = None
        """What a server said or did, which tells more than that nobody is left."""
        while True:
            try:
                return await self.open(
                    start, end, failed=failed, previous=previous, following=following, is_urgent=is_urgent, plan=plan
                )
            except PetalsError as error:
                if isinstance(error, MissingBlocksError):
                    is_final = not is_urgent and not self._swarm.directory.were_held(start, end)
                else:
                    is_final = error.disposition is Disposition.GIVE_UP or (
                        not is_urgent and isinstance(error, _LASTING)
                    )
                if not isinstance(error, MissingBlocksError):
                    failure = error
                if is_final or loop.time() + pause_s >= deadline_s:
                    if failure is not None and not is_urgent:
                        raise explain_end(failure) from None
                    raise
                if loop.time() - told_s >= _TELL_S:
                    told_s = loop.time()
                    _logger.warning(
                        "waiting for a server of %s of %s (%.0f of %.0f s): %s",
                        describe_blocks([(start, end)]),
                        self._swarm.model_name,
                        told_s - started_s,
                        deadline_s - started_s,
                        error.message,
                    )
            plan = None
            await asyncio.sleep(pause_s)
            if pause_s > _FIRST_PAUSE_S:
                failed.clear()
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def _open_hop(self, hop: Hop, server: SignedAnnouncement, *, timeout_s: float) -> HopSession:
        connection = await self._swarm.connect(server)
        tensors: tuple[Any, ...] | None = None
        payload: Sequence[Buffer] = ()
        if self._prompts is not None:
            spec, payload = encode(self._prompts[hop.start - self._start : hop.end - self._start])
            tensors = (spec.to_wire(),)
        request = OpenSession(
            session_id=HopSession.new_id(),
            fingerprint=self._swarm.fingerprint,
            start=hop.start,
            end=hop.end,
            num_rows=self._num_rows,
            max_length=self._max_length,
            deadline_ms=int(timeout_s * 1000),
            tensors=tensors,
            keeps_graphs=self._keeps_graphs or None,
        )

        async def send(fields: dict[str, Any]) -> HopSession:
            opening = HopSession.open(hop, server, connection, replace(request, **fields), payload, timeout_s=timeout_s)
            return await attend(opening, connection, drop=self._swarm.drop)

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
