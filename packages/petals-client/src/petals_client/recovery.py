"""What a session does when something has happened to its chain: replace, connect, rebuild.

A server that fails is replaced by one or several others for exactly its blocks. The server before sends them what it
has kept of its outputs; where nobody has, the nearest server before that has, or the client itself, which keeps what
the first server was sent. Then the parts of the step under way are sent again. Servers drop what is left of earlier
attempts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from petals_client.flight import Flight, InterruptedFlight
from petals_client.opening import MAX_WAIT_S
from petals_client.patience import Patience
from petals_client.session import HopSession, make_step
from petals_client.swarm import explain_failure
from petals_core.errors import (
    DeadlineExceededError,
    Disposition,
    DrainingError,
    InvalidRequestError,
    NextHopError,
    OutputsGoneError,
    OverloadedError,
    PeerConnectionError,
    PetalsError,
    RemoteFailureError,
)
from petals_core.identity import PeerId
from petals_core.steps import merge, straighten
from petals_core.tensors.states import join_states, select_rows
from petals_core.wire.messages import Progress

if TYPE_CHECKING:
    from petals_client.swarm_session import SwarmSession

_logger = logging.getLogger(__name__)
_MAX_REFUSALS = 8
"""Times that a step waits for a server that is full for the moment."""
_MAX_FAILURES = 32
"""Of servers in one step."""
_REPLAY_TOKENS = 256
"""Of one step in which others are brought to where a server was: several follow each other through new servers."""
_STUCK_S = 3.0
"""After so long without a change between two servers that both answer, the client carries the states between them,"""
_SLOWEST_BYTES_PER_S = 125_000
"""beside the time that a part takes on a link of 1 Mbit/s."""
_STAY_S = 5.0
"""How long a server that is about to stop goes on being used where nobody else holds its blocks."""


class Recovery:
    """Keeps a session's chain whole. Belongs to the session."""

    def __init__(self, session: SwarmSession) -> None:
        self._session = session
        self._failures: list[tuple[PeerId, PetalsError]] = []
        """Of the step under way."""
        self._failure: PetalsError | None = None
        """The last one, explained."""
        self._num_refusals = 0
        self._retry_after_s: float | None = None
        """A server was too busy for a step."""
        self._is_disturbed = False
        """Something has happened that recovery must put right."""
        self._suspects: set[HopSession] = set()
        """Servers that could not pass states on to the next."""
        self._acknowledged: dict[HopSession, int] = {}
        """Numbers of the last steps by which servers were rebuilt in this attempt."""
        self._news = asyncio.Event()
        self._seen: tuple[float, list[tuple[int | None, int | None]]] | None = None
        """When servers were last seen to be where they are."""

    def begin_step(self) -> None:
        """Failures are counted anew, and servers that are about to stop are left."""
        self._failures.clear()
        self._failure = None
        self._num_refusals = 0
        self._seen = None
        now_s = asyncio.get_running_loop().time()
        for hop in self._session.hops:
            if hop.connection.is_draining and hop.error is None and now_s >= hop.stays_until_s:
                self._is_disturbed = True

    def is_needed(self) -> bool:
        """Whether the chain can't be used as it is."""
        return self._is_disturbed

    def note(self, hop: HopSession, error: PetalsError) -> None:
        """Something has happened at a server."""
        self._is_disturbed = True
        if error.attempt is None:
            hop.error = hop.error or error
        elif isinstance(error, NextHopError):
            self._suspects.add(hop)
        elif error.disposition is Disposition.RETRY_SAME:
            self._retry_after_s = max(self._retry_after_s or 0.0, min(error.retry_after_s or 0.5, MAX_WAIT_S))
            self._failure = explain_failure(hop.hop, error)
        else:
            hop.error = hop.error or error
        self._news.set()

    def acknowledged(self, hop: HopSession, number: int) -> None:
        """A server has done a step that rebuilds it."""
        self._acknowledged[hop] = number
        self._news.set()

    async def recover(self, flight: Flight) -> None:
        """Put the chain into the state behind all parts that have come back, ready for the next one of ``flight``.

        Raises:
            PetalsError: the request itself is at fault, too little was kept, or there is nobody else.
        """
        session = self._session
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + session.swarm.options.recovery_timeout_s
        while self._is_disturbed:
            if session.is_closed:
                raise InvalidRequestError("the session was closed while a step was under way")
            self._is_disturbed = False
            session.attempt += 1
            self._acknowledged.clear()
            if self._suspects:
                await self._find_cut()
            if self._retry_after_s is not None:
                await self._wait_for_room()
            await self._replace(deadline_s)
            try:
                await self.connect()
                if not self._is_disturbed and flight.next_request.keep:
                    await self._rebuild(flight.next_number)
            except InterruptedFlight:
                self._is_disturbed = True

    # --- others in the place of who failed ----------------------------------------------------------------------------

    async def _replace(self, deadline_s: float) -> None:
        session = self._session
        while broken := self._find_broken():
            first, last = broken
            leaving = session.hops[first : last + 1]
            start, end = leaving[0].hop.start, leaving[-1].hop.end
            for hop in leaving:
                if hop.error is not None:
                    self._blame(hop, hop.error)
                    hop.close()
            excluded = self._excluded() | {hop.hop.peer_id for hop in leaving if hop.connection.is_draining}
            previous = session.hops[first - 1].hop.peer_id if first else None
            following = session.hops[last + 1].hop.peer_id if last + 1 < len(session.hops) else None
            try:
                if leaving[0].error is None:
                    opened = await session.opener.open(
                        start, end, failed=excluded, previous=previous, following=following
                    )
                else:
                    opened = await session.opener.wait_and_open(
                        start, end, failed=excluded, deadline_s=deadline_s, previous=previous, following=following
                    )
            except PetalsError as error:
                if leaving[0].error is None:  # it still serves
                    leaving[0].stays_until_s = asyncio.get_running_loop().time() + _STAY_S
                    continue
                raise self._failure or error from error
            for hop in leaving:
                hop.close()
            if session.is_closed:
                for hop in opened:
                    hop.close()
                raise InvalidRequestError("the session was closed while a step was under way")
            for hop in opened:
                session.watch(hop)
            session.hops[first : last + 1] = opened
            if first:
                session.hops[first - 1].is_cut_off = False
            _logger.info(
                "%s replaced by %s",
                " and ".join(f"server {hop.hop.peer_id.short}" for hop in leaving),
                ", ".join(hop.hop.peer_id.short for hop in opened),
            )

    def _find_broken(self) -> tuple[int, int] | None:
        """The first run of servers that failed, or a server that is about to stop."""
        hops = self._session.hops
        now_s = asyncio.get_running_loop().time()
        for first, hop in enumerate(hops):
            if hop.error is not None:
                last = first
                while last + 1 < len(hops) and hops[last + 1].error is not None:
                    last += 1
                return first, last
            if hop.connection.is_draining and now_s >= hop.stays_until_s:
                return first, first
        return None

    def _blame(self, hop: HopSession, error: PetalsError) -> None:
        """Note whose fault a failure was; raises the explanation if it is our own, or if there were too many."""
        self._failure = explain_failure(hop.hop, error)
        if error.disposition is Disposition.GIVE_UP:
            raise self._failure from error
        if isinstance(error, DrainingError):
            return
        if error.disposition is Disposition.RETRY_SAME:  # it made room for others, and may be asked for it again
            self._count_refusal()
            return
        self._session.swarm.blame(hop.hop.peer_id, error)
        self._failures.append((hop.hop.peer_id, error))
        if len(self._failures) > _MAX_FAILURES:
            raise self._failure from error

    def _excluded(self) -> set[PeerId]:
        """Servers that this step asks no more. A cut connection may happen once to everybody."""
        peers = [peer_id for peer_id, _ in self._failures]
        return {
            peer_id
            for peer_id, error in self._failures
            if not isinstance(error, PeerConnectionError) or peers.count(peer_id) > 1
        }

    async def _wait_for_room(self) -> None:
        """A server was too busy: the same again in a moment."""
        wait_s, self._retry_after_s = self._retry_after_s, None
        self._count_refusal()
        await asyncio.sleep(wait_s or 0.0)

    def _count_refusal(self) -> None:
        self._num_refusals += 1
        if self._num_refusals > _MAX_REFUSALS:
            raise self._failure or OverloadedError("the servers are too busy")

    # --- the ways between them ----------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Tell all servers their places; who can't reach the next one gets the client's help."""
        session = self._session
        hops = session.hops
        timeout_s = session.swarm.options.connect_timeout_s + 1.0

        async def tell(index: int) -> None:
            hop = hops[index]
            previous = hops[index - 1] if index and not hops[index - 1].is_cut_off else None
            is_last = index + 1 == len(hops)
            try:
                await hop.route(
                    attempt=session.attempt,
                    previous=previous,
                    following=None if is_last or hop.is_cut_off else hops[index + 1],
                    is_last=is_last,
                    timeout_s=timeout_s,
                )
            except NextHopError as error:
                self._cut_off(hop, error)
            except PetalsError as error:
                self.note(hop, error)

        while True:
            before = [hop.is_cut_off for hop in hops]
            await asyncio.gather(*(tell(index) for index in range(len(hops))))
            if self._is_disturbed or before == [hop.is_cut_off for hop in hops]:
                return

    async def _find_cut(self) -> None:
        """Find out whether it is the next server that is gone, or only the way to it."""
        hops = self._session.hops
        suspects = [index for index, hop in enumerate(hops[:-1]) if hop in self._suspects]
        self._suspects.clear()
        await asyncio.gather(*(self._ask(hops[index + 1]) for index in suspects))
        for index in suspects:
            if hops[index + 1].error is None:
                self._cut_off(hops[index])

    def _cut_off(self, hop: HopSession, error: NextHopError | None = None) -> None:
        hops = self._session.hops
        index = hops.index(hop)
        if hop.is_cut_off or index + 1 == len(hops):
            return
        hop.is_cut_off = True
        following = hops[index + 1]
        if following.error is None:
            _logger.warning(
                "servers %s and %s can't reach each other, so this client carries the hidden states between them%s",
                hop.hop.peer_id.short,
                following.hop.peer_id.short,
                "" if error is None else f": {error.message}",
            )

    # --- bringing new servers to where the others are -----------------------------------------------------------------

    async def _rebuild(self, before: int) -> None:
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
            while source >= 0 and not await self._replay(source, last, before):
                hops[source].is_empty = True  # it computes all anew, with those behind it
                source -= 1
            if source < 0:
                await self._replay_inputs(last, before)
            for hop in hops[max(0, source + 1) : last + 1]:
                hop.is_empty = False
            last = first

    async def _replay(self, source: int, last: int, before: int) -> bool:
        """Let a server send its kept outputs to those behind it; False if it has not kept them."""
        session = self._session
        hop = session.hops[source]
        timeout_s = session.swarm.options.step_timeout_s
        try:
            number = await hop.replay(
                attempt=session.attempt,
                before=before,
                passes=last - source - 1,
                max_tokens=_REPLAY_TOKENS,
                timeout_s=timeout_s,
            )
        except OutputsGoneError:
            return False
        except NextHopError as error:
            self._cut_off(hop, error)
            raise InterruptedFlight from None
        except DrainingError:
            return False
        except PetalsError as error:
            self.note(hop, error)
            raise InterruptedFlight from None
        if number is not None:
            await self._wait_for(session.hops[last], number)
        return True

    async def _replay_inputs(self, last: int, before: int) -> None:
        session = self._session
        steps = straighten(session.history.before(before), select_rows) if session.history.is_complete else None
        if steps is None:
            raise self._failure or RemoteFailureError("the session is too long to be rebuilt: open another one")
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
            await self._wait_for(session.hops[last], steps[-1][0])
        finally:
            sending.cancel()

    async def _wait_for(self, hop: HopSession, number: int) -> None:
        """Wait until a server has done a step of those that rebuild it.

        Raises:
            InterruptedFlight: something has happened meanwhile.
        """
        session = self._session
        started_s = time.perf_counter()
        num_looks = 0
        while self._acknowledged.get(hop, -1) < number:
            if self._is_disturbed or session.is_closed:
                raise InterruptedFlight
            self._news.clear()
            try:
                async with asyncio.timeout(session.patience.wait_s(is_decode=False, num_looks=num_looks)):
                    await self._news.wait()
                num_looks = 0
                started_s = time.perf_counter()
            except TimeoutError:
                num_looks += 1
                await self._look(started_s)

    # --- looking what has become of a step ----------------------------------------------------------------------------

    async def look(self, flight: Flight) -> None:
        """No part of a step has come back for a while: find out where it is, and interrupt it if it is nowhere."""
        progress = await self._look(flight.news_s)
        if not self._is_disturbed:
            self._check_ways(flight, progress)
        if self._is_disturbed:
            flight.interrupt()

    async def _look(self, since_s: float) -> list[Progress | None]:
        """Ask all servers how far they are; who does not answer is broken, and after too long who is behind."""
        session = self._session
        session.swarm.directory.freshen()  # so that whoever could take a silent one's place is known by then
        hops = list(session.hops)
        progress = await asyncio.gather(*(self._ask(hop, since_s) for hop in hops))
        waited_s = time.perf_counter() - since_s
        if not self._is_disturbed and waited_s > session.swarm.options.step_timeout_s:
            behind = [
                each.computed if each is not None and each.attempt == session.attempt else None for each in progress
            ]
            slow = next((i for i in range(1, len(hops)) if (behind[i] or -1) < (behind[i - 1] or -1)), 0)
            if behind[0] is not None and slow == 0:
                slow = len(hops) - 1
            self.note(hops[slow], DeadlineExceededError(f"no answer to a step within {waited_s:.1f} s"))
        return progress

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
            self.note(hop, DeadlineExceededError(f"no answer to a step within {waited_s:.1f} s"))
        except PetalsError as error:
            self.note(hop, error)
        return None

    def _check_ways(self, flight: Flight, progress: Sequence[Progress | None]) -> None:
        """Where a server has computed a part, and the next has not received it for long, the way is stuck."""
        session = self._session
        now_s = time.perf_counter()
        state = [
            (None, None) if each is None or each.attempt != session.attempt else (each.received, each.computed)
            for each in progress
        ]
        if self._seen is None or self._seen[1] != state:
            self._seen = (now_s, state)
            return
        number = flight.next_number
        sent = flight.expects(number)
        if sent is None or now_s - self._seen[0] < _STUCK_S + sent.spec.num_bytes / _SLOWEST_BYTES_PER_S:
            return
        for index, (received, _) in enumerate(state):
            if received is not None and received >= number:
                continue
            if index == 0:
                self.note(session.hops[0], DeadlineExceededError("a step did not arrive there"))
            elif (state[index - 1][1] or -1) >= number and progress[index] is not None:
                self._is_disturbed = True
                self._cut_off(session.hops[index - 1])
            return
