"""What a client measures of servers: how far away each is, and how busy it says that it is.

Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import PetalsError
from petals_core.identity import PeerId
from petals_core.net.dialer import PeerConnection
from petals_core.net.rpc import call
from petals_core.net.tasks import BackgroundTasks
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Info, InfoRequest

MAX_ASKED: Final = 16
"""Servers that are asked for one plan."""
WAIT_S: Final = 1.0
"""How long a plan waits for servers that were never met. Who is slower counts from the next plan on."""
FRESH_S: Final = 5.0
"""Age at which what a server said of its load is asked anew."""
REFRESH_WAIT_S: Final = 0.3
"""How long a plan waits for that."""
_TIMEOUT_S: Final = 5.0
_RETRY_S: Final = 60.0
"""When a server that could not be met is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One server, as it was seen last. Loads are its claims."""

    round_trip_s: float
    num_sessions: int | None = None
    """None: it was not asked yet."""
    cache_tokens_left: int | None = None
    asked_at_s: float = -1e9


class Measurements:
    """Measurements of servers, made when a plan needs them."""

    def __init__(
        self,
        connect: Callable[[SignedAnnouncement], Awaitable[PeerConnection]],
        *,
        blame: Callable[[PeerId, PetalsError], None],
        rng: random.Random,
    ) -> None:
        """``connect`` returns the open connection to a server or makes one; ``blame`` is told of who can't be met."""
        self._connect = connect
        self._blame = blame
        self._rng = rng
        self._known: dict[PeerId, Measurement] = {}
        self._tried_at_s: dict[PeerId, float] = {}
        self._asking: dict[PeerId, asyncio.Task[None]] = {}
        self._tasks = BackgroundTasks()

    def get(self, peer_id: PeerId) -> Measurement | None:
        """What is known of a server."""
        return self._known.get(peer_id)

    def note_round_trip(self, peer_id: PeerId, round_trip_s: float) -> None:
        """Take over what a connection measured."""
        known = self._known.get(peer_id)
        self._known[peer_id] = Measurement(
            round_trip_s=round_trip_s,
            num_sessions=None if known is None else known.num_sessions,
            cache_tokens_left=None if known is None else known.cache_tokens_left,
            asked_at_s=-1e9 if known is None else known.asked_at_s,
        )

    def forget_others(self, present: Collection[PeerId]) -> None:
        """Drop what is known of servers that are not there any more."""
        for table in (self._known, self._tried_at_s):
            for peer_id in table.keys() - present:
                del table[peer_id]

    async def refresh(self, servers: Mapping[PeerId, SignedAnnouncement], *, start: int, end: int) -> None:
        """Meet servers that were never met and ask the others how busy they are, for a plan of blocks ``start:end``.

        At most ``MAX_ASKED`` of each; those that could begin or end the chain come first. Who is slow is left behind.
        """
        now_s = asyncio.get_running_loop().time()
        held = {
            peer_id: signed
            for peer_id, signed in servers.items()
            if signed.announcement.start < end and signed.announcement.end > start
        }
        new = [
            signed
            for peer_id, signed in held.items()
            if peer_id not in self._known and now_s >= self._tried_at_s.get(peer_id, -1e9) + _RETRY_S
        ]
        old = [
            signed
            for peer_id, signed in held.items()
            if (known := self._known.get(peer_id)) is not None and now_s >= known.asked_at_s + FRESH_S
        ]
        waits = []
        for group, wait_s in ((new, WAIT_S), (old, REFRESH_WAIT_S)):
            if len(group) > MAX_ASKED:
                self._rng.shuffle(group)
                group.sort(key=lambda each: not (each.announcement.start <= start or each.announcement.end >= end))
            tasks = [self._ask(signed) for signed in group[:MAX_ASKED]]
            if tasks:
                waits.append(asyncio.wait(tasks, timeout=wait_s))
        if waits:
            await asyncio.gather(*waits)

    async def close(self) -> None:
        """Ask nobody any more."""
        await self._tasks.close()

    def _ask(self, signed: SignedAnnouncement) -> asyncio.Task[None]:
        """Ask a server in the background; callers that come together share one question."""
        peer_id = signed.peer_id
        task = self._asking.get(peer_id)
        if task is None:
            self._tried_at_s[peer_id] = asyncio.get_running_loop().time()
            task = self._asking[peer_id] = self._tasks.start(self._meet(signed), name=f"asking {peer_id.short}")
            task.add_done_callback(lambda _: self._asking.pop(peer_id, None))
        return task

    async def _meet(self, signed: SignedAnnouncement) -> None:
        try:
            connection = await self._connect(signed)
            reply = await call(connection, InfoRequest(), reply=Info, priority=Priority.DECODE, timeout_s=_TIMEOUT_S)
        except PetalsError as error:
            self._known.pop(signed.peer_id, None)
            self._blame(signed.peer_id, error)
            return
        info = reply.body
        assert isinstance(info, Info)
        self._known[signed.peer_id] = Measurement(
            round_trip_s=connection.rtt_s,
            num_sessions=info.num_sessions,
            cache_tokens_left=info.cache_tokens_left,
            asked_at_s=asyncio.get_running_loop().time(),
        )
