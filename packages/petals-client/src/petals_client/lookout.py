"""Where a step is that does not come back: what its servers say of it, and who says nothing any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from petals_client.flight import Flight
from petals_client.patience import Patience
from petals_client.session import HopSession
from petals_core.errors import DeadlineExceededError, DrainingError, OverloadedError, PetalsError
from petals_core.wire.messages import Progress

if TYPE_CHECKING:
    from petals_client.recovery import Recovery
    from petals_client.swarm_session import SwarmSession

_STUCK_S = 3.0
"""After so long without a change between two servers that both answer, the client carries the states between them,"""
_SLOWEST_BYTES_PER_S = 125_000
"""beside the time that a part takes on a link of 1 Mbit/s."""


class Lookout:
    """Asks a session's servers how far they are, and tells its recovery what is wrong."""

    def __init__(self, session: SwarmSession, recovery: Recovery) -> None:
        self._session = session
        self._recovery = recovery
        self._seen: tuple[float, list[tuple[int, int]]] | None = None
        """When servers were last seen to be where they are."""

    def begin_step(self) -> None:
        """What was seen of the step before counts no more."""
        self._seen = None

    async def look(self, flight: Flight) -> None:
        """No part of a step has come back for a while: find out where it is, and interrupt it if it is nowhere."""
        progress = await self.survey(flight.news_s)
        if not self._recovery.is_needed():
            self._check_ways(flight, progress)
        if self._recovery.is_needed():
            flight.interrupt()

    async def survey(self, since_s: float, *, source: int = -1, last: int | None = None) -> list[Progress | None]:
        """Ask all servers how far they are; who does not answer is broken, and after too long who is behind.

        What is waited for comes from the client, or the server with the index ``source``, and goes as far as ``last``.
        """
        session = self._session
        session.swarm.directory.freshen()  # so that whoever could take a silent one's place is known by then
        hops = list(session.hops)
        progress = await asyncio.gather(*(self._ask(hop, since_s) for hop in hops))
        waited_s = time.perf_counter() - since_s
        if not self._recovery.is_needed() and waited_s > session.swarm.options.step_timeout_s:
            end = len(hops) if last is None else last + 1
            slow = find_slow(hops[:end], self._of_attempt(progress)[:end], source)
            self._recovery.note(hops[slow], DeadlineExceededError(f"no answer to a step within {waited_s:.1f} s"))
        return progress

    async def find_cuts(self, suspects: Iterable[HopSession]) -> None:
        """Find out whether it is the next server that is gone, or only the way from a suspect to it."""
        hops = self._session.hops
        indices = [index for index, hop in enumerate(hops[:-1]) if hop in suspects]
        await asyncio.gather(*(self._ask(hops[index + 1]) for index in indices))
        for index in indices:
            if hops[index + 1].error is None:
                self._recovery.cut_off(hops[index])

    async def _ask(self, hop: HopSession, since_s: float | None = None) -> Progress | None:
        """How far a server is; None where it is broken, or too busy to say."""
        swarm = self._session.swarm
        asked_s = time.perf_counter()
        timeout_s = min(Patience.probe_s(hop.connection.rtt_s), swarm.options.step_timeout_s)
        try:
            return await hop.progress(timeout_s=timeout_s)
        except (DrainingError, OverloadedError):
            return None
        except DeadlineExceededError:
            waited_s = time.perf_counter() - (asked_s if since_s is None else since_s)
            swarm.drop(hop.connection)
            self._recovery.note(hop, DeadlineExceededError(f"no answer to a step within {waited_s:.1f} s"))
        except PetalsError as error:
            self._recovery.note(hop, error)
        return None

    def _of_attempt(self, progress: Sequence[Progress | None]) -> list[Progress]:
        session = self._session
        return [credible(each, attempt=session.attempt, end=session.next_number) for each in progress]

    def _check_ways(self, flight: Flight, progress: Sequence[Progress | None]) -> None:
        """Where a server has computed a part, and the next has not received it for long, the way is stuck."""
        session = self._session
        now_s = time.perf_counter()
        state = [(_number(each.received), _number(each.computed)) for each in self._of_attempt(progress)]
        if self._seen is None or self._seen[1] != state:
            self._seen = (now_s, state)
            return
        number = flight.next_number
        part = flight.find(number)
        if part is None or now_s - self._seen[0] < _STUCK_S + part[1].spec.num_bytes / _SLOWEST_BYTES_PER_S:
            return
        hops = session.hops
        for index, (received, _) in enumerate(state):
            if received >= number:
                continue
            if index == 0:
                self._recovery.note(hops[0], DeadlineExceededError("a step did not arrive there"))
            elif state[index - 1][1] >= number and progress[index] is not None and not hops[index - 1].is_cut_off:
                self._recovery.disturb()
                self._recovery.cut_off(hops[index - 1])
            return


def _number(step: int | None) -> int:
    """A step's number, or less than any for none."""
    return -1 if step is None else step


def credible(progress: Progress | None, *, attempt: int, end: int) -> Progress:
    """What a server has done in the attempt under way: nothing, where it has not heard of it.

    Nothing either where it speaks of a step that nobody has sent, with a number of ``end`` or more: whatever came to it
    from the server before, it was none of ours.
    """
    if progress is None or progress.attempt != attempt:
        return Progress(attempt=attempt)
    if max(_number(progress.received), _number(progress.computed)) >= end:
        return Progress(attempt=attempt)
    return progress


def find_slow(hops: Sequence[HopSession], progress: Sequence[Progress], source: int) -> int:
    """The index of the server for which all those behind ``source`` have waited too long."""
    computed = [_number(each.computed) for each in progress]
    if source >= 0:  # it has computed what it sends long ago
        received = [_number(each.received) for each in progress]
        return next((i for i in range(source + 1, len(hops)) if received[i] > computed[i]), source)
    for index in range(1, len(hops)):
        if computed[index] < computed[index - 1]:
            before = hops[index - 1]
            return index - 1 if before.is_cut_off and before.handed_on <= computed[index] else index
    return len(hops) - 1 if computed[0] >= 0 else 0
