"""How far it is from this server to those that are likely to come next in a chain, and how fast they are.

Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.limits import MAX_NEXT_DELAYS
from petals_core.net.dialer import Dialer
from petals_core.net.tasks import BackgroundTasks
from petals_core.next_delays import NextDelays
from petals_core.observation import Observations
from petals_core.swarm_key import SwarmKey
from petals_server.trial import try_decoding

log = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 40.0
"""Between two looks at who is there."""
MEASURE_INTERVAL_S: Final = 300.0
"""Age at which a delay is measured again."""
MAX_MEASURED: Final = 8
"""Servers that are measured at one look."""
MAX_KNOWN: Final = 64
"""Servers whose delays are remembered."""
TRIAL_INTERVAL_S: Final = 300.0
"""At least so long a server that was timed is left alone; at each look one is timed."""
_TIMEOUT_S: Final = 3.0
_JITTER: Final = 0.2


class Neighbours:
    """Measures one-way delays to servers that hold the block behind this server's last one.

    ``delays`` are the shortest, for the announcement: half of the round trip that a connection's hello took. From the
    second look on, one of them at a time computes a few tokens, which shows what its announced speed is worth.
    """

    def __init__(
        self,
        find_servers: Callable[[], Awaitable[Iterable[SignedAnnouncement]]],
        *,
        identity: Identity,
        swarm_key: SwarmKey | None,
        start: int,
        end: int,
        hidden_size: int,
        rng: random.Random,
    ) -> None:
        self.delays = NextDelays()
        """(digest of a peer id, seconds), as announcements have them."""
        self._find_servers = find_servers
        self._identity = identity
        self._swarm_key = swarm_key
        self._start = start
        self._end = end
        self._hidden_size = hidden_size
        self._rng = rng
        self._observations = Observations()
        self._tried_at_s: dict[PeerId, float] = {}
        self._measured: dict[PeerId, tuple[float, float]] = {}
        """Delay and when it was measured."""
        self._tasks = BackgroundTasks()

    def start(self, on_first: Callable[[], Awaitable[None]]) -> None:
        """Look and measure in the background; ``on_first`` is called when there are delays for the first time."""
        self._tasks.start(self._measure_regularly(on_first), name="petals neighbours")

    def hold(self, start: int, end: int) -> None:
        """The server holds other blocks now."""
        self._start, self._end = start, end
        self._measured.clear()
        self.delays = NextDelays()

    @property
    def percents(self) -> tuple[tuple[bytes, int], ...]:
        """Percent of the announced speed that servers reached when they were timed, by the beginnings of their ids."""
        return self._observations.percents()

    async def close(self) -> None:
        """Measure no more."""
        await self._tasks.close()

    async def measure(self) -> None:
        """Look who is there and measure those that were not measured for a while."""
        servers = list(await self._find_servers())
        candidates = choose_likely(servers, self._start, self._end, own=self._identity.peer_id)
        present = {signed.peer_id for signed in candidates}
        for peer_id in self._measured.keys() - present:
            del self._measured[peer_id]
        now_s = asyncio.get_running_loop().time()
        await self._try_one([signed for signed in candidates if signed.peer_id in self._measured], now_s)
        due = [
            signed
            for signed in candidates
            if (known := self._measured.get(signed.peer_id)) is None or now_s >= known[1] + MEASURE_INTERVAL_S
        ]
        self._rng.shuffle(due)
        due.sort(key=lambda signed: signed.peer_id in self._measured)  # those never measured first
        if due:
            await self._measure(due[:MAX_MEASURED])
        while len(self._measured) > MAX_KNOWN:
            del self._measured[max(self._measured, key=lambda peer_id: self._measured[peer_id][0])]
        shortest = sorted((delay_s, peer_id) for peer_id, (delay_s, _) in self._measured.items())
        self.delays = NextDelays.of((peer_id.digest, delay_s) for delay_s, peer_id in shortest[:MAX_NEXT_DELAYS])

    async def _measure(self, servers: Sequence[SignedAnnouncement]) -> None:
        dialer = Dialer(identity=self._identity, swarm_key=self._swarm_key, connect_timeout_s=_TIMEOUT_S)

        async def meet(signed: SignedAnnouncement) -> None:
            peer_id = signed.peer_id
            try:
                connection = await dialer.connect(signed.announcement.addresses, peer_id=peer_id)
            except PetalsError as error:
                self._measured.pop(peer_id, None)
                log.debug("the delay to %s could not be measured: %s", peer_id.short, error.message)
            else:
                now_s = asyncio.get_running_loop().time()
                self._measured[peer_id] = (min(connection.rtt_s / 2, _TIMEOUT_S), now_s)

        try:
            for signed in servers:  # one after another: handshakes that compete would measure each other
                await meet(signed)
        finally:
            await dialer.close()

    async def _try_one(self, servers: Sequence[SignedAnnouncement], now_s: float) -> None:
        """Time one of those that were not timed lately."""
        self._tried_at_s = {
            peer_id: at_s for peer_id, at_s in self._tried_at_s.items() if now_s < at_s + TRIAL_INTERVAL_S
        }
        due = [
            signed
            for signed in servers
            if signed.announcement.inference_tokens_per_s and signed.peer_id not in self._tried_at_s
        ]
        if not due:
            return
        signed = self._rng.choice(due)
        self._tried_at_s[signed.peer_id] = now_s
        dialer = Dialer(identity=self._identity, swarm_key=self._swarm_key, connect_timeout_s=_TIMEOUT_S)
        try:
            connection = await dialer.connect(signed.announcement.addresses, peer_id=signed.peer_id)
            for timing in await try_decoding(connection, signed.announcement, hidden_size=self._hidden_size):
                self._observations.note(signed.peer_id, expected_s=timing.expected_s, took_s=timing.took_s)
        except PetalsError as error:
            log.debug("server %s could not be timed: %s", signed.peer_id.short, error.message)
        finally:
            await dialer.close()

    async def _measure_regularly(self, on_first: Callable[[], Awaitable[None]]) -> None:
        was_told = False
        while True:
            try:
                await self.measure()
                if self.delays and not was_told:
                    was_told = True
                    await on_first()
            except PetalsError as error:
                log.debug("neighbours could not be measured: %s", error.message)
            await asyncio.sleep(LOOK_INTERVAL_S * self._rng.uniform(1 - _JITTER, 1 + _JITTER))


def choose_likely(
    servers: Iterable[SignedAnnouncement], start: int, end: int, *, own: PeerId
) -> list[SignedAnnouncement]:
    """Servers that may come behind one with blocks ``start:end`` in a chain, and take it further."""
    return [
        signed
        for signed in servers
        if signed.peer_id != own
        and signed.announcement.state == "online"
        and signed.announcement.addresses
        and start < signed.announcement.start <= end < signed.announcement.end
    ]
