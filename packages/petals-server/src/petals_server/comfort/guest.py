"""Pauses a server when its owner wants the machine, and tells once a minute what was served."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Final, Protocol

from petals_core.net.tasks import BackgroundTasks
from petals_server.comfort.busyness import Busyness
from petals_server.comfort.meter import CpuMeter, GpuMeter
from petals_server.comfort.schedule import Schedule

log = logging.getLogger(__name__)

_LOOK_S: Final = 5.0
_TELL_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server has done since it started."""

    num_requests: int = 0
    """Sessions and requests without one."""
    num_tokens: int = 0
    """Through its span."""
    num_peers: int = 0
    """Different clients."""
    num_sessions: int = 0
    """Open now."""

    def since(self, before: Served) -> str:
        """What came since then, for people; empty if nothing did."""
        tokens, requests = self.num_tokens - before.num_tokens, self.num_requests - before.num_requests
        if not tokens and not requests:
            return ""
        return f"served {tokens} tokens in the last minute, {requests} new requests, {self.num_sessions} sessions open"


class Host(Protocol):
    """What a guest needs of its server."""

    async def pause(self, reason: str) -> None:
        """Take no work, and end what is open, until ``resume``."""

    async def resume(self) -> None:
        """Take work again."""

    def served(self) -> Served:
        """What was done so far."""


class Guest:
    """Watches clock and device."""

    def __init__(self, host: Host, *, schedule: Schedule | None, meter: CpuMeter | GpuMeter | None) -> None:
        self._host = host
        self._schedule = schedule
        self._meter = meter
        self._busyness = Busyness()
        self._reason: str | None = None
        self._tasks = BackgroundTasks()

    def start(self) -> None:
        """Begin in the background."""
        if self._schedule is not None or self._meter is not None:
            self._tasks.start(self._watch(), name="petals guest")
        self._tasks.start(self._tell(), name="petals minute")

    async def close(self) -> None:
        """End."""
        await self._tasks.close()

    async def look(self, *, minute: int, now_s: float) -> None:
        """Pause or go on, by the minute of the day and a monotonic time."""
        reason = None
        if self._schedule is not None and not self._schedule.is_open(minute):
            reason = f"outside of its hours ({self._schedule})"
        if self._meter is not None and self._busyness.note(await self._meter.measure(), now_s=now_s):
            reason = reason or "the machine is used by its owner"
        if reason is not None and self._reason is None:
            self._reason = reason
            log.info("pausing: %s", reason)
            await self._host.pause(reason)
        elif reason is None and self._reason is not None:
            self._reason = None
            log.info("serving again")
            await self._host.resume()

    async def _watch(self) -> None:
        while True:
            now = time.localtime()
            try:
                await self.look(minute=60 * now.tm_hour + now.tm_min, now_s=time.monotonic())
            except Exception:
                log.exception("could not pause or go on")
            await asyncio.sleep(_LOOK_S)

    async def _tell(self) -> None:
        before = self._host.served()
        while True:
            await asyncio.sleep(_TELL_S)
            now = self._host.served()
            if text := now.since(before):
                log.info("%s", text)
            before = now
