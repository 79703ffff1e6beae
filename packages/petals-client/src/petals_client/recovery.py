"""What a session does when something has happened to its chain: replace, connect, rebuild.

A server that fails is replaced by one or several others for exactly its blocks. These are brought to where it was
(``rebuilding.py``), and the parts of the step under way are sent again. Servers drop what is left of earlier attempts.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from petals_client.flight import Flight, InterruptedFlight
from petals_client.liveness import attend
from petals_client.lookout import Lookout
from petals_client.objections import Objections
from petals_client.opening import MAX_WAIT_S
from petals_client.rebuilding import Rebuilding
from petals_client.session import HopSession
from petals_client.swarm import explain_end, explain_failure
from petals_core.errors import (
    Disposition,
    InvalidRequestError,
    NextHopError,
    OverloadedError,
    PeerConnectionError,
    PetalsError,
    ProtocolError,
)
from petals_core.identity import PeerId

if TYPE_CHECKING:
    from petals_client.swarm_session import SwarmSession

_logger = logging.getLogger(__name__)
_MAX_REFUSALS = 8
"""Times that a step waits for a server that is full for the moment."""
_MAX_FAILURES = 32
"""Of servers in one step."""
_MAX_REFUSALS_OF_ONE = 3
"""After so many of one server in a step others are looked for."""
_STAY_S = 5.0
"""How long a server that should be left goes on being used where nobody else holds its blocks."""


class Recovery:
    """Keeps a session's chain whole. Belongs to the session."""

    def __init__(self, session: SwarmSession) -> None:
        self._session = session
        self._failures: list[tuple[PeerId, PetalsError]] = []
        """Of the step under way."""
        self._objections = Objections()
        """Against the step under way."""
        self.failure: PetalsError | None = None
        """The last one, explained."""
        self._num_refusals = 0
        self._retry_after_s: float | None = None
        """A server was too busy for a step."""
        self._is_disturbed = False
        """Something has happened that recovery must put right."""
        self._suspects: set[HopSession] = set()
        """Servers that could not pass states on to the next."""
        self.lookout = Lookout(session, self)
        self.rebuilding = Rebuilding(session, self)

    def begin_step(self) -> None:
        """Failures are counted anew, and servers that are about to stop are left."""
        self._failures.clear()
        self._objections = Objections()
        self.failure = None
        self._num_refusals = 0
        self.lookout.begin_step()
        self.rebuilding.begin_step()
        now_s = asyncio.get_running_loop().time()
        for hop in self._session.hops:
            hop.num_refusals = 0
            if hop.error is None and _is_to_be_left(hop, now_s):
                self._is_disturbed = True

    def end_step(self) -> None:
        """The step is done; so whoever said that it can't be was wrong."""
        if (refuted := self._objections.refuted()) is not None:
            self._session.swarm.blame(*refuted)

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
            hop.num_refusals += 1
            self._retry_after_s = max(self._retry_after_s or 0.0, min(error.retry_after_s or 0.5, MAX_WAIT_S))
            self.failure = explain_failure(hop.hop, error)
        elif error.disposition is Disposition.GIVE_UP:
            self._note_objection(hop, error)
        else:
            hop.error = hop.error or error
        self.rebuilding.interrupt()

    def _note_objection(self, hop: HopSession, error: PetalsError) -> None:
        """A server calls a step wrong: it is asked once more for what nobody but this client has sent."""
        hops = self._session.hops
        index = hops.index(hop)
        if self.rebuilding.distrust(hop):
            return
        if index and not hops[index - 1].is_cut_off:
            hops[index - 1].is_cut_off = True
            _logger.info(
                "server %s calls wrong what server %s passes on, so this client carries it: %s",
                hop.hop.peer_id.short,
                hops[index - 1].hop.peer_id.short,
                error.message,
            )
            return
        hop.error = hop.error or error

    def disturb(self) -> None:
        """The chain has to be put right, though no server has failed."""
        self._is_disturbed = True

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
            self.rebuilding.begin_attempt()
            for hop in session.hops:
                hop.handed_on = -1
            if self._suspects:
                suspects, self._suspects = self._suspects, set()
                await self.lookout.find_cuts(suspects)
            if self._retry_after_s is not None:
                await self._wait_for_room()
            await self._replace(deadline_s)
            try:
                await self.connect()
                if not self._is_disturbed and flight.next_request.keep:
                    await self.rebuilding.run(before=flight.next_number, keep=flight.next_request.keep)
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
            is_optional = leaving[0].error is None  # it still serves
            is_doubted = not self._objections.peers.isdisjoint(hop.hop.peer_id for hop in leaving)
            excluded = self._excluded() | {
                hop.hop.peer_id for hop in leaving if is_optional or hop.connection.is_draining
            }
            previous = session.hops[first - 1].hop.peer_id if first else None
            following = session.hops[last + 1].hop.peer_id if last + 1 < len(session.hops) else None
            try:
                if is_optional or is_doubted:
                    opened = await session.opener.open(
                        start, end, failed=excluded, previous=previous, following=following, is_urgent=not is_optional
                    )
                else:
                    opened = await session.opener.wait_and_open(
                        start, end, failed=excluded, deadline_s=deadline_s, previous=previous, following=following
                    )
            except PetalsError as error:
                if is_optional:
                    leaving[0].stays_until_s = asyncio.get_running_loop().time() + _STAY_S
                    continue
                failure = self._objections.failure if is_doubted else self.failure
                raise (error if failure is None else explain_end(failure)) from error
            for hop in leaving:
                hop.close()
                if hop.num_refusals >= _MAX_REFUSALS_OF_ONE and self.failure is not None:
                    session.swarm.blame(hop.hop.peer_id, self.failure)
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
        """The first run of servers that failed, or a server that should be left."""
        hops = self._session.hops
        now_s = asyncio.get_running_loop().time()
        for first, hop in enumerate(hops):
            if hop.error is not None:
                last = first
                while last + 1 < len(hops) and hops[last + 1].error is not None:
                    last += 1
                return first, last
            if _is_to_be_left(hop, now_s):
                return first, first
        return None

    def _blame(self, hop: HopSession, error: PetalsError) -> None:
        """Note whose fault a failure was; raises the explanation if it is our own, or if there were too many."""
        self.failure = explain_failure(hop.hop, error)
        if error.disposition is Disposition.GIVE_UP:
            self._objections.note(hop.hop.peer_id, error, self.failure)
            return
        if error.disposition is Disposition.RETRY_SAME:  # it made room for others, and may be asked for it again
            self._count_refusal()
        else:
            self._session.swarm.blame(hop.hop.peer_id, error)
        self._failures.append((hop.hop.peer_id, error))
        if len(self._failures) > _MAX_FAILURES:
            raise explain_end(self.failure) from error

    def _excluded(self) -> set[PeerId]:
        """Servers that this step asks no more. To lose a connection, or a cache, may happen once to everybody."""
        peers = [peer_id for peer_id, _ in self._failures]
        return self._objections.peers | {
            peer_id
            for peer_id, error in self._failures
            if peers.count(peer_id) > 1
            or not (isinstance(error, PeerConnectionError) or error.disposition is Disposition.RETRY_SAME)
        }

    async def _wait_for_room(self) -> None:
        """A server was too busy: the same again in a moment."""
        wait_s, self._retry_after_s = self._retry_after_s, None
        self._count_refusal()
        await asyncio.sleep(wait_s or 0.0)

    def _count_refusal(self) -> None:
        self._num_refusals += 1
        if self._num_refusals > _MAX_REFUSALS:
            raise self.failure or OverloadedError("the servers are too busy")

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
            route = hop.route(
                attempt=session.attempt,
                previous=previous,
                following=None if is_last or hop.is_cut_off else hops[index + 1],
                is_last=is_last,
                timeout_s=timeout_s,
            )
            try:
                await attend(route, hop.connection, drop=session.swarm.drop)
            except NextHopError as error:
                self.cut_off(hop, error)
            except PetalsError as error:
                self.note(hop, error)

        while True:
            before = [hop.is_cut_off for hop in hops]
            pending = {asyncio.create_task(tell(index)) for index in range(len(hops))}
            try:
                # Who waits for a server that has fallen silent would wait for long.
                while pending and not self._is_disturbed:
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
            finally:
                for task in pending:
                    task.cancel()
                if pending:
                    await asyncio.wait(pending)
            if self._is_disturbed or before == [hop.is_cut_off for hop in hops]:
                return

    def cut_off(self, hop: HopSession, error: NextHopError | None = None) -> None:
        """A server can't reach the next one: the client carries the states between them from now on.

        One that has no next one to reach, and says so again, is broken.
        """
        hops = self._session.hops
        index = hops.index(hop)
        if hop.is_cut_off or index + 1 == len(hops):
            hop.error = hop.error or ProtocolError("it has this client alone to send to, and says that it can't")
            self._is_disturbed = True
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


def _is_to_be_left(hop: HopSession, now_s: float) -> bool:
    """Whether others are to take the place of a server that still serves: it is about to stop, or too busy."""
    return (hop.connection.is_draining or hop.num_refusals >= _MAX_REFUSALS_OF_ONE) and now_s >= hop.stays_until_s
