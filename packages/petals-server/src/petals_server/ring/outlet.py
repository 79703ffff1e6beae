"""Where a session's outputs go: to the next server, as its next steps, or to the client.

Where there is no next server, or none that can be reached, the client gets the very step that would have been pushed,
and passes it on.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from petals_core.errors import NextHopError, PetalsError
from petals_core.limits import MAX_HOPS, MIB
from petals_core.net.dialer import PeerConnection
from petals_core.net.stream import Stream
from petals_core.steps import wanted_tokens
from petals_core.tensors.states import States, select_last
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Route, Step, StepResult
from petals_server.ring.next_hops import NextHops

log = logging.getLogger(__name__)

_BACKLOG_BYTES: Final = 4 * MIB
"""Outputs of one session that wait for the network before the next step is computed."""


class Outlet:
    """The way out of one session, which its client chooses and may change at any time."""

    def __init__(self, next_hops: NextHops, client: Stream) -> None:
        self.is_last = True
        """Whether outputs are results: the session's is the last span of its chain."""
        self._next_hops = next_hops
        self._client = client
        self._stream: Stream | None = None
        """To the next server."""
        self._connection: PeerConnection | None = None
        self._next_session: bytes | None = None

    async def lead(self, request: Route) -> None:
        """Take the way that the client chooses; one call at a time.

        Raises:
            NextHopError: the next server can't be reached, or does not take steps from here.
            InvalidAnnouncementError, WrongModelError: see :meth:`NextHops.check`.
        """
        if self._stream is not None and self._stream.is_open and self._next_session == request.next_session:
            return
        if self._stream is not None:
            self._stream.cancel()
        self._stream = self._connection = None
        self._next_session = request.next_session
        if request.next is None or request.next_session is None:
            return
        server = self._next_hops.check(request.next)
        self._connection, self._stream = await self._next_hops.reach(
            server, request.next_session, timeout_s=request.deadline_ms / 1000, source=self._client.source
        )

    def close(self) -> None:
        """Give up the way to the next server."""
        if self._stream is not None:
            self._stream.cancel()

    async def send(
        self,
        step: Step,
        output: States,
        *,
        queue_us: int,
        compute_us: int,
        deadline_s: float,
        is_followed: bool = False,
    ) -> None:
        """Send what came of a step where it belongs, with the times that it took; what is not wanted does not travel.

        Args:
            is_followed: what came of one that was computed with it, and continues it, comes right behind.

        Raises:
            PetalsError: the client is gone.
            NextHopError: the next server is; the client is to be told.
        """
        connection = self._connection if self._stream is not None else None
        delay_us = 0 if connection is None else max(0, round(connection.rtt_s / 2 * 1e6))
        hops = (*(step.hops or ()), (queue_us, compute_us, delay_us))[:MAX_HOPS]
        if step.passes == 0 or self.is_last:
            result = None if step.passes is not None or step.wanted == 0 else output
            if result is not None and step.wanted is not None:
                result = select_last(step.row_tokens, result, wanted_tokens(step.row_tokens, step.wanted))
            self._client.priority = Priority.of_step(sum(step.row_tokens))
            await self._client.send(
                StepResult(
                    step=step.step,
                    attempt=step.attempt,
                    tensors=() if result is None else (result.spec.to_wire(),),
                    queue_us=queue_us,
                    compute_us=compute_us,
                    hops=hops,
                ),
                () if result is None else result.payload,
                backlog_bytes=_BACKLOG_BYTES,
            )
            return
        passed = Step(
            step=step.step,
            keep=step.keep,
            row_tokens=step.row_tokens,
            tensors=(output.spec.to_wire(),),
            deadline_ms=max(1, int(1000 * (deadline_s - time.monotonic()))),
            row_order=step.row_order,
            position_runs=step.position_runs,
            attempt=step.attempt,
            passes=None if step.passes is None else step.passes - 1,
            wanted=step.wanted,
            join_tokens=step.join_tokens,
            is_followed=is_followed or None,
            hops=hops,
        )
        await self.pass_on(passed, output)

    async def pass_on(self, step: Step, states: States) -> None:
        """Send the next server a step.

        Raises:
            PetalsError: as ``send``.
        """
        stream = self._stream or self._client
        stream.priority = Priority.of_step(sum(step.row_tokens))
        try:
            await stream.send(step, states.payload, backlog_bytes=_BACKLOG_BYTES)
        except PetalsError as error:
            if stream is self._client:
                raise
            if stream is self._stream:  # else the client has chosen another way meanwhile, and sends the step again
                self._stream = None
                log.debug("a next server can't be reached any more: %s", error.message)
                raise NextHopError("the next server can't be reached any more") from None
