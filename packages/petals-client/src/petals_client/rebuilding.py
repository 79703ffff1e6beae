"""Bringing servers that are new in a session's chain to where the others are.

The server before sends what it has kept of its outputs; where that has kept nothing, the nearest one before that has,
or the client itself, which keeps what the first server was sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from petals_client.flight import InterruptedFlight
from petals_client.liveness import attend
from petals_client.session import HopSession, make_step
from petals_core.errors import (
    DrainingError,
    NextHopError,
    OutputsGoneError,
    PetalsError,
    ProtocolError,
    RemoteFailureError,
)
from petals_core.steps import merge, straighten
from petals_core.tensors.states import join_states, select_rows

if TYPE_CHECKING:
    from petals_client.recovery import Recovery
    from petals_client.swarm_session import SwarmSession

_logger = logging.getLogger(__name__)
_REPLAY_TOKENS = 256
"""Of one step in which others are brought to where a server was: several follow each other through new servers."""


class Rebuilding:
    """Fills the caches of a chain's new servers. Belongs to the session's recovery."""

    def __init__(self, session: SwarmSession, recovery: Recovery) -> None:
        self._session = session
        self._recovery = recovery
        self._acknowledged: dict[HopSession, int] = {}
        """Numbers of the last steps by which servers were rebuilt in this attempt."""
        self._sources: dict[HopSession, HopSession] = {}
        """Servers that were rebuilt in the step under way, and those whose outputs did that."""
        self._news = asyncio.Event()

    def begin_step(self) -> None:
        """Those that were rebuilt before have proven since that they are where they should be."""
        self._sources.clear()

    def begin_attempt(self) -> None:
        """What servers have acknowledged so far counts no more."""
        self._acknowledged.clear()

    def acknowledged(self, hop: HopSession, number: int) -> None:
        """A server has done a step that rebuilds it."""
        self._acknowledged[hop] = number
        self._news.set()

    def interrupt(self) -> None:
        """Something has happened to the chain: whoever waits is to see what."""
        self._news.set()

    def distrust(self, hop: HopSession) -> bool:
        """A server calls wrong what it is sent: False, or it was rebuilt in this step from what another one kept.

        Then that was perhaps not what it should have been, which nobody can tell, so nobody is blamed: it is rebuilt
        once more from elsewhere.
        """
        source = self._sources.pop(hop, None)
        if source is None:
            return False
        source.can_replay = False
        hop.is_empty = True
        _logger.info(
            "server %s is rebuilt once more, without what server %s has kept",
            hop.hop.peer_id.short,
            source.hop.peer_id.short,
        )
        return True

    async def run(self, *, before: int, keep: int) -> None:
        """Bring all servers that are empty into the state behind the steps with numbers below ``before``.

        That has ``keep`` columns or more, and at least one.

        Raises:
            InterruptedFlight: something has happened meanwhile.
            PetalsError: too little was kept.
        """
        hops = self._session.hops
        last = len(hops)
        while True:
            # From the right, so that what is rebuilt once more on the way is rebuilt only once.
            empty = [index for index in range(last) if hops[index].is_empty]
            if not empty:
                return
            last = empty[-1]
            first = last
            while first and hops[first - 1].is_empty:
                first -= 1
            source = first - 1
            while source >= 0 and not await self._replay(source, last, before, keep):
                hops[source].is_empty = True  # it computes all anew, with those behind it
                source -= 1
            if source < 0:
                await self._replay_inputs(last, before)
            for hop in hops[max(0, source + 1) : last + 1]:
                hop.is_empty = False
            last = first

    async def _replay(self, source: int, last: int, before: int, keep: int) -> bool:
        """Let a server send its kept outputs to those behind it; False if it has not kept them."""
        session = self._session
        hop = session.hops[source]
        if not hop.can_replay:
            return False
        asked = hop.replay(
            attempt=session.attempt,
            before=before,
            passes=last - source - 1,
            max_tokens=_REPLAY_TOKENS,
            timeout_s=session.swarm.options.step_timeout_s,
        )
        try:
            number = await attend(asked, hop.connection, drop=session.swarm.drop)
        except (OutputsGoneError, DrainingError):
            return False
        except NextHopError as error:
            self._recovery.cut_off(hop, error)
            raise InterruptedFlight from None
        except PetalsError as error:
            self._recovery.note(hop, error)
            raise InterruptedFlight from None
        if number is None or not self._suffices(number, before, keep):
            claim = "nothing" if number is None else f"steps up to {number}"
            self._recovery.note(hop, ProtocolError(f"it has kept {claim} where step {before} needs {keep} columns"))
            raise InterruptedFlight
        for other in session.hops[source + 1 : last + 1]:
            self._sources[other] = hop
        await self._wait_for(last, number, source=source)
        return True

    def _suffices(self, last: int, before: int, keep: int) -> bool:
        """Whether steps up to ``last`` can lead to so many columns, as far as this client remembers them."""
        if last >= before:
            return False
        history = self._session.history
        if not history.is_complete:
            return True
        known = history.before(last + 1)
        return bool(known) and known[-1].request.end >= keep

    async def _replay_inputs(self, last: int, before: int) -> None:
        session = self._session
        steps = straighten(session.history.before(before), select_rows) if session.history.is_complete else None
        if steps is None:
            raise self._recovery.failure or RemoteFailureError(
                "the session is too long to be rebuilt: open another one"
            )
        if not steps:
            return
        timeout_s = session.swarm.options.step_timeout_s

        async def send() -> None:
            for number, request, states in merge(steps, join_states, _REPLAY_TOKENS):
                await session.send(
                    0, make_step(number, request, states, session.attempt, timeout_s, passes=last), states
                )

        sending = asyncio.create_task(send())  # a server that hangs takes nothing, which is seen only while one looks
        try:
            await self._wait_for(last, steps[-1][0])
        finally:
            sending.cancel()

    async def _wait_for(self, last: int, number: int, *, source: int = -1) -> None:
        """Wait until the server with index ``last`` has done a step of those that rebuild it, which ``source`` sends.

        Raises:
            InterruptedFlight: something has happened meanwhile.
        """
        session = self._session
        started_s = time.perf_counter()
        num_looks = 0
        hop = session.hops[last]
        while self._acknowledged.get(hop, -1) < number:
            if self._recovery.is_needed() or session.is_closed:
                raise InterruptedFlight
            self._news.clear()
            try:
                async with asyncio.timeout(session.patience.wait_s(is_decode=False, num_looks=num_looks)):
                    await self._news.wait()
                num_looks = 0
                started_s = time.perf_counter()
            except TimeoutError:
                num_looks += 1
                await self._recovery.lookout.survey(started_s, source=source, last=last)
