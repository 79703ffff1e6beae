"""Who failed a micro-batch so far, and whom that leaves to try."""

from __future__ import annotations

import asyncio
from typing import Final

from petals_client.objections import Objections
from petals_client.swarm import Swarm, explain_end, explain_failure
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import Disposition, MissingBlocksError, PeerConnectionError, PetalsError
from petals_core.identity import PeerId
from petals_core.routing.graph import Chain, Hop

Plan = tuple[Chain, dict[PeerId, SignedAnnouncement]]
"""A chain, and what all servers announced."""

_MAX_WAIT_S: Final = 5.0
"""For a server that asks to be asked again later."""


class Attempts:
    """The attempts at one micro-batch. Belongs to one event loop."""

    def __init__(self, swarm: Swarm, adapter: str | None) -> None:
        self._swarm = swarm
        self._adapter = adapter
        self._failures: list[tuple[PeerId, PetalsError]] = []
        self._barred: set[PeerId] = set()
        """Servers that are asked no more while there are others."""
        self._busy: set[PeerId] = set()
        """Servers that others are preferred to, but need not be waited for."""
        self._objections = Objections()
        self._last: PetalsError | None = None
        self._deadline_s: float | None = None

    async def plan(self, start: int, end: int) -> Plan:
        """A chain without those that failed.

        Where all that hold a block have failed, or none is left, it waits for one to come, and has the least bad try
        again meanwhile.

        Raises:
            PetalsError: the last failure, when time is up, or that the request is wrong, as the only one says who can
                be asked; ``MissingBlocksError`` if nobody failed yet.
        """
        while True:
            without = self._barred | self._busy | self._objections.peers
            try:
                return await self._swarm.plan(
                    start, end, without=without, adapter=self._adapter, is_urgent=self._last is not None
                )
            except MissingBlocksError as missing:
                if self._busy:
                    self._busy.clear()
                    continue
                if self._objections.failure is not None:
                    raise self._objections.failure from None
                if self._last is None and not self._swarm.directory.were_held(start, end):
                    raise
                if not await self._swarm.wait_for_servers(missing, deadline_s=self._deadline()):
                    raise (missing if self._last is None else explain_end(self._last)) from None
                self._barred.clear()

    def _deadline(self) -> float:
        """Of what is done about failures; it begins with the first one."""
        if self._deadline_s is None:
            self._deadline_s = asyncio.get_running_loop().time() + self._swarm.options.recovery_timeout_s
        return self._deadline_s

    def end(self) -> None:
        """The micro-batch is done; so whoever said that it can't be was wrong."""
        if (refuted := self._objections.refuted()) is not None:
            self._swarm.blame(*refuted)

    async def note(self, hop: Hop, error: PetalsError) -> bool:
        """Note a failure, and wait where the server asks for it; raises it if it is the last.

        Returns whether the server is to be asked for the same again.
        """
        now_s = asyncio.get_running_loop().time()
        options = self._swarm.options
        self._swarm.blame(hop.peer_id, error)
        self._last = failure = explain_failure(hop, error)
        self._failures.append((hop.peer_id, error))
        deadline_s = self._deadline()
        # Servers that are not there cost nothing but time.
        num_answered = sum(not isinstance(each, PeerConnectionError) for _, each in self._failures)
        is_over = len(self._failures) >= options.max_attempts and now_s >= deadline_s
        if num_answered >= options.max_attempts or is_over:
            raise explain_end(failure) from error
        is_first = not self._is_second(hop.peer_id)
        if error.disposition is Disposition.GIVE_UP:
            self._objections.note(hop.peer_id, error, failure)
        elif error.disposition is Disposition.RETRY_SAME:
            await asyncio.sleep(min(error.retry_after_s or 0.5, _MAX_WAIT_S))
            if not is_first:
                self._busy.add(hop.peer_id)
            return is_first
        elif not isinstance(error, PeerConnectionError) or not is_first:
            self._barred.add(hop.peer_id)
        return False

    def _is_second(self, peer_id: PeerId) -> bool:
        """A cut connection may happen once to everybody."""
        return sum(each == peer_id for each, _ in self._failures) > 1
