"""A model's servers, seen from a client: which to use, how to reach them, what to do when one fails.

Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Iterable

from petals_client.directory import ServerDirectory
from petals_client.options import ClientOptions
from petals_client.packing import PositionRuns
from petals_client.routing.health import HealthLedger
from petals_client.session import States, read_states
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import Disposition, DrainingError, MissingBlocksError, PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.net.dialer import Dialer, PeerConnection
from petals_core.net.rpc import call
from petals_core.routing.cost import estimate_cost
from petals_core.routing.graph import Chain, Hop, describe_blocks, find_gaps
from petals_core.routing.planner import plan_chain
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Forward, ForwardResult

_logger = logging.getLogger(__name__)
_MAX_MEASURED = 16
"""Servers whose round trip is measured for a plan."""
_MEASURE_TIMEOUT_S = 1.0


class Swarm:
    """Access to the servers of one checkpoint."""

    def __init__(
        self,
        options: ClientOptions,
        *,
        model_name: str,
        fingerprint: str,
        num_blocks: int,
        torch_dtype: str,
        quantization: str | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """``quantization`` is how the checkpoint itself is stored, if it is quantized."""
        self.options = options
        self.model_name = model_name
        self.fingerprint = fingerprint
        self.num_blocks = num_blocks
        identity = Identity.ephemeral()
        self.directory = ServerDirectory(
            options, model_name=model_name, fingerprint=fingerprint, num_blocks=num_blocks, identity=identity
        )
        self.health = HealthLedger()
        self._torch_dtype = torch_dtype
        self._quantization = quantization
        self._rng = rng or random.Random()
        self._dialer = Dialer(
            identity=identity, swarm_key=options.swarm_key, connect_timeout_s=options.connect_timeout_s
        )
        self._round_trips: dict[PeerId, float] = {}
        self._unreachable: set[PeerId] = set()
        self._warned_dtypes: set[str] = set()

    async def close(self) -> None:
        """Close all connections."""
        await self.directory.close()
        await self._dialer.close()

    # --- planning -----------------------------------------------------------------------------------------------------

    async def plan(
        self, start: int, end: int, *, without: Collection[PeerId] = (), cache_tokens: int = 0
    ) -> tuple[Chain, dict[PeerId, SignedAnnouncement]]:
        """Choose a chain over blocks ``start:end`` that avoids some servers; also returns what all servers announced.

        Raises:
            MissingBlocksError: some blocks are held by no live server.
            NoPeersError: no peer of the swarm answers.
        """
        usable = await self._usable(without)
        if find_gaps(((each.announcement.start, each.announcement.end) for each in usable.values()), start, end):
            # A server may have come a moment ago.
            await self.directory.refresh()
            usable = await self._usable(without)
        await self._measure(usable)
        now_s = asyncio.get_running_loop().time()
        servers = [
            estimate_cost(
                signed.announcement,
                peer_id,
                round_trip_s=self._round_trips.get(peer_id),
                penalty_s=self.health.penalty_s(peer_id, now_s=now_s),
                cache_tokens=cache_tokens,
            )
            for peer_id, signed in usable.items()
        ]
        try:
            chain = plan_chain(servers, start, end, model_name=self.model_name, rng=self._rng)
        except MissingBlocksError:
            raise await self._explain_missing(start, end) from None
        self._warn_of_dtypes(usable[hop.peer_id] for hop in chain)
        return chain, usable

    async def _usable(self, without: Collection[PeerId]) -> dict[PeerId, SignedAnnouncement]:
        return {
            signed.peer_id: signed
            for signed in await self.directory.servers()
            if signed.peer_id not in without and self.options.excludes(signed.announcement) is None
        }

    async def _explain_missing(self, start: int, end: int) -> MissingBlocksError:
        """Say whether it is the client's own demands that leave no chain."""
        servers = await self.directory.servers()
        spans = [(signed.announcement.start, signed.announcement.end) for signed in servers]
        reasons = [self.options.excludes(signed.announcement) for signed in servers]
        allowed = [span for span, reason in zip(spans, reasons, strict=True) if reason is None]
        gaps = find_gaps(allowed, start, end)
        if find_gaps(spans, start, end) or not gaps:
            return await self.directory.explain_missing(start, end)
        excluded = sorted({reason for reason in reasons if reason is not None})
        return MissingBlocksError(
            f"{describe_blocks(gaps)} of {self.model_name} can be had only from servers "
            f"with {' and '.join(excluded)}, which allowed_quantization and allowed_dtypes exclude: allow more, or "
            "start a server"
        )

    async def connect(self, signed: SignedAnnouncement) -> PeerConnection:
        """Return a connection to a server.

        Raises:
            PetalsError: it can't be reached.
        """
        peer_id = signed.peer_id
        connection = await self._dialer.connect(signed.announcement.addresses, peer_id=peer_id)
        if connection.is_draining:
            raise DrainingError("it is about to stop")
        self._round_trips[peer_id] = connection.rtt_s
        return connection

    def round_trip_s(self, peer_id: PeerId) -> float | None:
        """What was measured for a server."""
        return self._round_trips.get(peer_id)

    def blame(self, peer_id: PeerId, error: PetalsError) -> None:
        """Note a server's failure, so that the next plan avoids it."""
        self.health.record_failure(peer_id, error, now_s=asyncio.get_running_loop().time())
        _logger.info("server %s failed: %s", peer_id.short, error.message)

    def praise(self, peer_id: PeerId) -> None:
        """Note a success."""
        self.health.record_success(peer_id, now_s=asyncio.get_running_loop().time())

    async def _measure(self, servers: dict[PeerId, SignedAnnouncement]) -> None:
        """Connect to servers that were never met, to learn their round trips; who is slow is left unmeasured."""
        new = [
            signed
            for peer_id, signed in servers.items()
            if peer_id not in self._round_trips and peer_id not in self._unreachable
        ]
        if not new:
            return
        if len(new) > _MAX_MEASURED:
            new = self._rng.sample(new, _MAX_MEASURED)

        async def meet(signed: SignedAnnouncement) -> None:
            try:
                await self.connect(signed)
            except PetalsError as error:
                self._unreachable.add(signed.peer_id)
                self.blame(signed.peer_id, error)

        tasks = [asyncio.create_task(meet(signed)) for signed in new]
        try:
            _, slow = await asyncio.wait(tasks, timeout=_MEASURE_TIMEOUT_S)
        except asyncio.CancelledError:
            slow = set(tasks)
            raise
        finally:
            for task in tasks:
                task.cancel()
        for signed, task in zip(new, tasks, strict=True):
            if task in slow:
                self._unreachable.add(signed.peer_id)

    # --- requests without a session -----------------------------------------------------------------------------------

    async def forward(
        self,
        states: States,
        *,
        start: int,
        end: int,
        row_tokens: tuple[int, ...],
        position_runs: PositionRuns | None,
    ) -> States:
        """Compute blocks ``start:end`` on whole rows. When a server fails, others go on from the states before it.

        Raises:
            PetalsError: no chain could do it; the text says what went wrong last.
        """
        position = start
        failed: set[PeerId] = set()
        failures: list[PetalsError] = []
        while position < end:
            try:
                chain, servers = await self.plan(position, end, without=failed)
            except MissingBlocksError:
                if not failures:
                    raise
                raise failures[-1] from None
            for hop in chain:
                request = Forward(
                    fingerprint=self.fingerprint,
                    start=hop.start,
                    end=hop.end,
                    row_tokens=row_tokens,
                    position_runs=position_runs,
                    tensors=(states.spec.to_wire(),),
                    deadline_ms=int(self.options.step_timeout_s * 1000),
                )
                try:
                    connection = await self.connect(servers[hop.peer_id])
                    reply = await call(
                        connection,
                        request,
                        states.payload,
                        reply=ForwardResult,
                        priority=Priority.BULK,
                        timeout_s=self.options.step_timeout_s,
                    )
                    assert isinstance(reply.body, ForwardResult)
                    states = read_states(reply, reply.body.tensors, states.spec)
                except PetalsError as error:
                    self.blame(hop.peer_id, error)
                    failures.append(explain_failure(hop, error))
                    if error.disposition is Disposition.GIVE_UP or len(failures) >= self.options.max_attempts:
                        raise failures[-1] from error
                    if error.disposition is Disposition.RETRY_SAME:
                        await asyncio.sleep(min(error.retry_after_s or 0.5, 5.0))
                    else:
                        failed.add(hop.peer_id)
                    break
                self.praise(hop.peer_id)
                position = hop.end
        return states

    def _warn_of_dtypes(self, chain: Iterable[SignedAnnouncement]) -> None:
        for signed in chain:
            announcement = signed.announcement
            kind = announcement.torch_dtype
            if announcement.quantization not in ("none", self._quantization):
                kind = f"{announcement.quantization} weights"
            if kind != self._torch_dtype and kind not in self._warned_dtypes:
                self._warned_dtypes.add(kind)
                _logger.warning(
                    "server %s computes with %s and this model with %s: results differ slightly from a local model's",
                    signed.peer_id.short,
                    kind,
                    self._torch_dtype,
                )


def explain_failure(hop: Hop, error: PetalsError) -> PetalsError:
    """Say which server failed, in the error's own class."""
    text = f"server {hop.peer_id.short} (blocks {hop.start}:{hop.end}) failed: {error.message}"
    if error.disposition is Disposition.GO_ELSEWHERE:
        text += "; it is avoided from now on, so try again"
    return type(error)(text, retry_after_s=error.retry_after_s)
