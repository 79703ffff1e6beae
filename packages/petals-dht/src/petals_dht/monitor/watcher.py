"""Looks the swarm up and talks to its servers, for a monitor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Self

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import DrainingError, OverloadedError, PetalsError
from petals_core.identity import PeerId
from petals_core.net.dialer import Dialer, PeerConnection
from petals_core.net.rpc import call
from petals_core.swarm_key import SwarmKey
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Info, InfoRequest
from petals_dht.directory import Directory
from petals_dht.monitor.observations import Observations, Probe
from petals_dht.overview import ModelOverview, ModelSummary, choose

_PROBE_TIMEOUT_S = 4.0
_PROBE_INTERVAL_S = 30.0
_MAX_PROBES_PER_S = 4.0
_MAX_PROBES = 16
"""Under way at once."""
_MAX_KEPT = 128
"""Connections that stay open, so that a server's end is noticed at once; those beyond are closed after the answer."""
_MAX_LOOK_UPS = 8
"""Under way at once."""
_OTHER_MODELS = 2
"""Models out of view that one round looks up too, in turn."""


class Watcher:
    """Fills ``observations``. Use it with ``async with``; afterwards no task or socket of its own is left."""

    def __init__(
        self,
        directory: Directory,
        observations: Observations,
        *,
        swarm_key: SwarmKey | None,
        wanted: str | None,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.observations = observations
        self._directory = directory
        self._wanted = wanted
        self._timeout_s = timeout_s
        self._clock = clock
        self._dialer = Dialer(
            identity=directory.identity, swarm_key=swarm_key, connect_timeout_s=min(timeout_s, _PROBE_TIMEOUT_S)
        )
        self._connections: dict[PeerId, PeerConnection] = {}
        self._probed: dict[PeerId, object] = {}
        """What each server announced of itself when it was probed last."""
        self._next_other = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._dialer.close()

    async def look_at_all(self) -> None:
        """Look up all models that are wanted.

        Raises:
            NoPeersError: no node of the swarm answers.
        """
        models = await self._list_models()
        room = asyncio.Semaphore(_MAX_LOOK_UPS)

        async def look(model: ModelSummary) -> None:
            async with room:
                await self._look_at(model)

        await asyncio.gather(*(look(model) for model in models))

    async def look(self, in_view: ModelSummary | None) -> None:
        """One round of a long watch: the list of models, the model in view, and some of the others in turn.

        A failure is noted in ``observations``.
        """
        try:
            models = await self._list_models()
            others = [model for model in models if not _is_same(model, in_view)]
            turn = [others[(self._next_other + number) % len(others)] for number in range(len(others[:_OTHER_MODELS]))]
            self._next_other += _OTHER_MODELS
            for model in [*(model for model in models if _is_same(model, in_view)), *turn]:
                await self._look_at(model)
        except PetalsError as error:
            self.observations.note_trouble(error.message)

    async def probe(self) -> bool:
        """Ask those servers whose turn it is what they are; True if there were any."""
        now_s = self._clock()
        announced = {
            signed.peer_id: signed for overview in self.observations.overviews() for signed in overview.servers
        }
        interval_s = max(_PROBE_INTERVAL_S, len(announced) / _MAX_PROBES_PER_S)
        due = [signed for signed in announced.values() if self._is_due(signed, now_s, interval_s)]
        room = asyncio.Semaphore(_MAX_PROBES)

        async def ask(signed: SignedAnnouncement) -> None:
            async with room:
                probe = await self._ask(signed)
            self._probed[signed.peer_id] = _gist(signed)
            self.observations.note_probe(signed.peer_id, probe)

        await asyncio.gather(*(ask(signed) for signed in due))
        for gone in set(self._probed) - set(announced):
            del self._probed[gone]
            await self._hang_up(gone)
        return bool(due)

    async def _list_models(self) -> Sequence[ModelSummary]:
        found = await self._directory.list_models(timeout_s=self._timeout_s)
        wanted = [each.model for each in choose([ModelOverview.of(model, ()) for model in found], self._wanted)]
        self.observations.note_models(wanted, at_s=self._clock())
        return wanted

    async def _look_at(self, model: ModelSummary) -> None:
        found = await self._directory.find_servers(model.fingerprint, timeout_s=self._timeout_s)
        self.observations.note_servers(model, found, at_s=self._clock())

    def _is_due(self, signed: SignedAnnouncement, now_s: float, interval_s: float) -> bool:
        peer_id = signed.peer_id
        probe, connection = self.observations.probes.get(peer_id), self._connections.get(peer_id)
        if probe is None or self._probed.get(peer_id) != _gist(signed) or now_s - probe.at_s >= interval_s:
            return True
        # It has hung up, which says more than its announcement.
        return connection is not None and connection.is_closed and not probe.failure

    async def _ask(self, signed: SignedAnnouncement) -> Probe:
        at_s, peer_id = self._clock(), signed.peer_id
        if not signed.announcement.addresses:
            return Probe(at_s=at_s, failure="it announces no address")
        connection = None
        try:
            connection = await self._dialer.connect(signed.announcement.addresses, peer_id=peer_id)
            reply = await call(
                connection,
                InfoRequest(),
                reply=Info,
                priority=Priority.DECODE,
                timeout_s=min(self._timeout_s, _PROBE_TIMEOUT_S),
            )
        except (OverloadedError, DrainingError) as error:
            # It is there, and says why it tells nothing.
            state = "draining" if isinstance(error, DrainingError) else None
            round_trip_s = None if connection is None else connection.rtt_s
            return Probe(at_s=at_s, round_trip_s=round_trip_s, state=state)
        except PetalsError as error:
            return Probe(at_s=at_s, failure=error.message)
        info = reply.body
        assert isinstance(info, Info)
        self._connections[peer_id] = connection
        if len(self._connections) > _MAX_KEPT:
            await self._hang_up(peer_id)
        return Probe(at_s=at_s, round_trip_s=connection.rtt_s, state=info.state, info=info)

    async def _hang_up(self, peer_id: PeerId) -> None:
        connection = self._connections.pop(peer_id, None)
        if connection is not None:
            await connection.close()


def _gist(signed: SignedAnnouncement) -> object:
    """What a server is probed anew for, when it changes."""
    announcement = signed.announcement
    return announcement.state, announcement.start, announcement.end, announcement.addresses, announcement.fingerprint


def _is_same(model: ModelSummary, other: ModelSummary | None) -> bool:
    return other is not None and (model.fingerprint, model.model_name, model.num_blocks) == (
        other.fingerprint,
        other.model_name,
        other.num_blocks,
    )
