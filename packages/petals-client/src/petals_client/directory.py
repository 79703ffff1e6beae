"""What is known of a model's servers, looked up when it is too old."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from petals_client.options import ClientOptions
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import MissingBlocksError, NoPeersError, PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.routing.graph import describe_blocks, find_gaps
from petals_dht.directory import Directory
from petals_dht.overview import ModelSummary, clock_text
from petals_dht.shards import ENOUGH_SERVERS

_USABLE_STATES = frozenset({"online"})
_GRACE_S = 1800.0


class ServerDirectory:
    """The live servers of one checkpoint. Belongs to one event loop."""

    def __init__(
        self,
        options: ClientOptions,
        *,
        model_name: str,
        fingerprint: str,
        num_blocks: int,
        identity: Identity,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._options = options
        self._model_name = model_name
        self._fingerprint = fingerprint
        self._num_blocks = num_blocks
        self._identity = identity
        self._clock = clock
        self._directory: Directory | None = None
        self._joining = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._servers: dict[PeerId, SignedAnnouncement] = {}
        self._ever_held: set[int] = set()
        """Blocks that servers which may be used have held since this client joined."""
        self._looked_up_at_s: float | None = None
        self._is_cut_off = False
        """Whether nobody answered the last look-up."""

    async def servers(self) -> dict[PeerId, SignedAnnouncement]:
        """Servers that are online and hold this very checkpoint; one announcement each, not expired.

        What is younger than ``refresh_s`` is returned at once; what is older too, while a look-up runs beside. While
        no peer answers look-ups, announcements stay for half an hour beyond their expiry: the servers may be well.

        Raises:
            NoPeersError: nothing is known yet and no peer answers.
        """
        now_s = self._clock()
        age_s = None if self._looked_up_at_s is None else now_s - self._looked_up_at_s
        if age_s is None or not self._servers:
            await self.refresh()
        elif age_s > self._options.refresh_s:
            self._start_refresh()
        oldest_s = now_s - _GRACE_S if self._is_cut_off else now_s
        return {
            peer_id: signed for peer_id, signed in self._servers.items() if signed.announcement.expires_at_s > oldest_s
        }

    def freshen(self) -> None:
        """Look the servers up beside whatever else is done."""
        self._start_refresh()

    async def refresh(self) -> None:
        """Look the servers up now; calls that come together share one look-up.

        Raises:
            NoPeersError: no peer answers. What was known before stays.
        """
        await asyncio.shield(self._start_refresh())

    def were_held(self, start: int, end: int) -> bool:
        """Whether all blocks ``start:end`` could be had at some time since this client joined."""
        return self._ever_held.issuperset(range(start, end))

    async def explain_missing(self, start: int, end: int) -> MissingBlocksError:
        """Say which of the blocks ``start:end`` nobody holds, and what might be meant instead."""
        known = (signed.announcement for signed in (await self.servers()).values())
        spans = [(each.start, each.end) for each in known]
        offset_s = None if spans else (await self._join()).suspected_clock_offset_s()
        if offset_s is not None:
            return MissingBlocksError(clock_text(offset_s))
        gaps = find_gaps(spans, start, end)
        is_one = len(gaps) == 1 and gaps[0][1] - gaps[0][0] == 1
        text = (
            f"{describe_blocks(gaps)} of {self._model_name} {'is' if is_one else 'are'} held by no live server"
            if gaps
            else f"no chain of servers for blocks {start}:{end} of {self._model_name} works at the moment"
        )
        others = await self.other_checkpoints()
        if others and not spans:
            text += (
                f"; there are servers of a different checkpoint of that name ({others[0].fingerprint[:12]}, yours is "
                f"{self._fingerprint[:12]}): use the same files or revision as they do"
            )
        else:
            text += "; wait for one, or start one with petals-server serve"
        return MissingBlocksError(text)

    async def other_checkpoints(self) -> list[ModelSummary]:
        """Models of the same name whose servers hold other files; none if the list can't be had."""
        try:
            directory = await self._join()
            models = await directory.list_models(timeout_s=self._options.connect_timeout_s)
        except PetalsError:
            return []
        name = self._model_name.rpartition("/")[2]
        return [
            model
            for model in models
            if model.model_name.rpartition("/")[2] == name and model.fingerprint != self._fingerprint
        ]

    async def close(self) -> None:
        """Leave the network."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])
        if self._directory is not None:
            await self._directory.close()

    def _start_refresh(self) -> asyncio.Task[None]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())
            self._refreshing.add_done_callback(_retrieve)
        return self._refreshing

    async def _refresh(self) -> None:
        directory = await self._join()
        now_s = self._clock()
        try:
            found = await directory.find_servers(
                self._fingerprint, wanted=ENOUGH_SERVERS, now=now_s, timeout_s=self._options.connect_timeout_s
            )
        except NoPeersError:
            self._is_cut_off = True
            raise
        self._is_cut_off = False
        self._servers = {
            signed.peer_id: signed
            for signed in found
            if signed.announcement.fingerprint == self._fingerprint
            and signed.announcement.num_blocks == self._num_blocks
            and signed.announcement.state in _USABLE_STATES
            and signed.announcement.addresses
        }
        for signed in self._servers.values():
            if self._options.excludes(signed) is None:
                self._ever_held.update(range(signed.announcement.start, signed.announcement.end))
        self._looked_up_at_s = now_s

    async def _join(self) -> Directory:
        async with self._joining:
            if self._directory is None:
                self._directory = await Directory.connect(
                    self._options.initial_peers,
                    swarm_key=self._options.swarm_key,
                    timeout_s=self._options.connect_timeout_s,
                    identity=self._identity,
                )
            return self._directory


def _retrieve(task: asyncio.Task[None]) -> None:
    """Look at a background look-up's error, so that asyncio does not report it: the next caller meets it again."""
    if not task.cancelled():
        task.exception()
