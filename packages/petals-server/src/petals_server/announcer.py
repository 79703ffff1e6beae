"""Keeps a server's announcement in the directory alive."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.errors import InvalidAnnouncementError, PetalsError
from petals_core.identity import Identity
from petals_core.net.tasks import BackgroundTasks
from petals_core.next_delays import NextDelays
from petals_dht.directory import Directory

log = logging.getLogger(__name__)

ANNOUNCE_TIMEOUT_S: Final = 15.0
_FIRST_RETRY_S: Final = 2.0
_WITHDRAW_TIMEOUT_S: Final = 5.0
_JITTER: Final = 0.2
"""Part of the interval by which it varies, so that servers that started together spread out."""


class Announcer:
    """Announces what ``describe`` says, again and again until it is stopped.

    ``describe(now_s, expires_at_s)`` returns the announcement as of now; both are Unix times.
    """

    def __init__(
        self,
        directory: Directory,
        identity: Identity,
        describe: Callable[[float, float], Announcement],
        *,
        interval_s: float,
        lifetime_s: float,
        rng: random.Random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._describe = describe
        self._interval_s = interval_s
        self._lifetime_s = lifetime_s
        self._rng = rng
        self._clock = clock
        self._tasks = BackgroundTasks()
        self._last: SignedAnnouncement | None = None
        self._is_started = False

    async def start(self) -> None:
        """Announce, and go on doing so in the background; the second time, only announce.

        Raises:
            NoPeersError: no node of the swarm keeps the announcement.
        """
        await self.announce()
        if not self._is_started:
            self._is_started = True
            self._tasks.start(self._announce_regularly(), name="petals announcer")

    async def announce(self, *, timeout_s: float = ANNOUNCE_TIMEOUT_S) -> None:
        """Announce now, to as many nodes as answer within ``timeout_s``; raises ``NoPeersError`` if none keeps it."""
        now_s = self._clock()
        signed = self._sign(self._describe(now_s, now_s + self._lifetime_s))
        self._last = signed
        await self._directory.announce(signed, timeout_s=timeout_s)

    def _sign(self, announcement: Announcement) -> SignedAnnouncement:
        """Sign, with as many of the delays to others as there is room for."""
        while True:
            try:
                return SignedAnnouncement.sign(announcement, self._identity)
            except InvalidAnnouncementError:
                if not announcement.next_delays:
                    raise
                announcement = replace(announcement, next_delays=NextDelays.of(list(announcement.next_delays)[:-1]))

    async def stop(self) -> None:
        """Stop announcing and take back what was announced, as far as the swarm can be reached."""
        await self._tasks.close()
        if self._last is None:
            return
        try:
            async with asyncio.timeout(_WITHDRAW_TIMEOUT_S):
                await self._directory.withdraw(self._last)
        except (PetalsError, TimeoutError) as error:
            log.info("could not tell the swarm that this server leaves: %s", error or "it took too long")
        self._last = None

    async def _announce_regularly(self) -> None:
        retry_s: float | None = None
        while True:
            interval_s = self._interval_s if retry_s is None else min(retry_s, self._interval_s)
            await asyncio.sleep(interval_s * self._rng.uniform(1 - _JITTER, 1 + _JITTER))
            try:
                await self.announce()
            except Exception as error:
                if retry_s is None:
                    known = isinstance(error, PetalsError)
                    log.warning("announcing failed and is tried again: %s", error, exc_info=None if known else error)
                retry_s = _FIRST_RETRY_S if retry_s is None else 2 * retry_s
            else:
                if retry_s is not None:
                    log.info("the swarm can be reached again")
                retry_s = None
