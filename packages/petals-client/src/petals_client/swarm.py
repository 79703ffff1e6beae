"""A model's servers, seen from a client: which to use, how to reach them, what to do when one fails.

Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Collection, Iterable
from typing import TypeAlias

from petals_client.adaptation import choose_servers, explain_missing_adapter
from petals_client.contribution import ContributionTab
from petals_client.directory import ServerDirectory
from petals_client.measuring import Measurements
from petals_client.options import ClientOptions
from petals_client.routing.explanation import Facts, Route, explain_chain
from petals_client.routing.health import HealthLedger
from petals_client.tuning_sessions import TuningSessions
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import (
    Disposition,
    DrainingError,
    MissingBlocksError,
    NoPeersError,
    PeerConnectionError,
    PetalsError,
)
from petals_core.identity import Identity, PeerId
from petals_core.net.dialer import Dialer, PeerConnection
from petals_core.observation import MAX_EXCUSE, Observations
from petals_core.routing.cost import SESSION_SHARE, estimate_cost
from petals_core.routing.flow import Branch, split_flow
from petals_core.routing.graph import Chain, Hop, Server, describe_blocks, find_gaps
from petals_core.routing.planner import plan_chain
from petals_core.wire.frames import MAX_DECODE_TOKENS

_logger = logging.getLogger(__name__)

_URGENT_S = 1.0
"""How long an urgent plan waits for the directory, where no known server holds some blocks."""

_PATIENCE_S = 1.0
"""Between two look-ups of a batch that waits for servers."""

Servers: TypeAlias = dict[PeerId, SignedAnnouncement]


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
        owner = options.identity
        identity = Identity.ephemeral() if owner is None else owner.derived("client")
        self.directory = ServerDirectory(
            options, model_name=model_name, fingerprint=fingerprint, num_blocks=num_blocks, identity=identity
        )
        self.health = HealthLedger()
        self.tuning = TuningSessions(self)
        """The client's own adapters on servers."""
        self._torch_dtype = torch_dtype
        self._quantization = quantization
        self._rng = rng or random.Random()
        self._dialer = Dialer(
            identity=identity,
            swarm_key=options.swarm_key,
            connect_timeout_s=options.connect_timeout_s,
            compression=options.compression,
        )
        self.measurements = Measurements(self.connect, blame=self.blame, rng=self._rng)
        self._observations = Observations()
        self.contribution = ContributionTab(
            identity,
            connect=self._connect_to_sound,
            observations=self._observations,
            owner=owner,
            receipts=options.receipts,
        )
        """What it signs for, and what its weight is."""
        self._warned_dtypes: set[str] = set()

    async def close(self) -> None:
        """Close all connections."""
        self.tuning.close()
        await self.contribution.close()
        await self.measurements.close()
        await self.directory.close()
        await self._dialer.close()

    # --- planning -----------------------------------------------------------------------------------------------------

    async def plan(
        self,
        start: int,
        end: int,
        *,
        without: Collection[PeerId] = (),
        cache_tokens: int = 0,
        previous: PeerId | None = None,
        following: PeerId | None = None,
        adapter: str | None = None,
        is_urgent: bool = False,
    ) -> tuple[Chain, Servers]:
        """Choose a chain over blocks ``start:end`` for a session; also returns what all usable servers announced.

        Args:
            without: servers that are not to be used.
            cache_tokens: what the session will need of each server's attention cache.
            previous, following: the servers between which it is to stand; None: the client.
            adapter: only servers that have it are used.
            is_urgent: what is known has to do, and nothing is measured.

        Raises:
            MissingBlocksError: some blocks are held by no live server.
            MissingAdapterError: some are held only by servers without the adapter.
            NoPeersError: no peer of the swarm answers.
        """
        usable = await self._usable(start, end, without, adapter, is_urgent=is_urgent)
        costs = self._weigh(usable, cache_tokens=cache_tokens)
        ends = {
            name: await self._weigh_one(peer_id) for name, peer_id in (("previous", previous), ("following", following))
        }
        try:
            chain = plan_chain(costs, start, end, model_name=self.model_name, **ends)
        except MissingBlocksError:
            raise await self._explain_missing(start, end, adapter) from None
        self._warn_of_dtypes(usable[hop.peer_id] for hop in chain)
        return chain, usable

    async def plan_batch(
        self, start: int, end: int, *, num_tokens: int, max_chains: int, adapter: str | None = None
    ) -> tuple[tuple[Branch, ...], Servers]:
        """Divide a batch whose parts have ``num_tokens`` among chains; raises what ``plan`` raises."""
        usable = await self._usable(start, end, (), adapter)
        costs = self._weigh(usable, batch_tokens=num_tokens)
        try:
            branches = split_flow(costs, start, end, model_name=self.model_name, max_chains=max_chains)
        except MissingBlocksError:
            raise await self._explain_missing(start, end, adapter) from None
        self._warn_of_dtypes(usable[hop.peer_id] for branch in branches for hop in branch.chain)
        return branches, usable

    async def wait_for_servers(self, missing: MissingBlocksError, *, deadline_s: float) -> bool:
        """Wait a moment for servers to come, and say so; False where ``deadline_s`` on the loop's clock has passed."""
        left_s = deadline_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            return False
        _logger.warning("%s; waiting for %.0f s more", missing.message, left_s)
        await asyncio.sleep(min(_PATIENCE_S, left_s))
        with contextlib.suppress(NoPeersError):
            await self.directory.refresh()
        return True

    async def explain_route(self, start: int, end: int, *, cache_tokens: int = 0) -> Route:
        """Plan as for a session, and say what decided; raises what ``plan`` raises."""
        usable = await self._usable(start, end, ())
        costs = self._weigh(usable, cache_tokens=cache_tokens)
        try:
            chain = plan_chain(costs, start, end, model_name=self.model_name)
        except MissingBlocksError:
            raise await self._explain_missing(start, end) from None
        now_s = asyncio.get_running_loop().time()
        known = {**await self.directory.servers(), **usable}
        facts = {
            peer_id: Facts(
                public_name=signed.announcement.public_name,
                is_measured=self.measurements.get(peer_id) is not None,
                penalty_s=self.health.penalty_s(peer_id, now_s=now_s),
                penalty_reason=None if (record := self.health.record(peer_id)) is None else record.reason,
                cache_tokens_left=self.cache_tokens_left(signed),
                excluded_by=self.options.excludes(signed),
            )
            for peer_id, signed in known.items()
        }
        spans = {peer_id: (each.announcement.start, each.announcement.end) for peer_id, each in known.items()}
        return explain_chain(
            chain, costs, facts, spans, model_name=self.model_name, start=start, end=end, cache_tokens=cache_tokens
        )

    async def _usable(
        self, start: int, end: int, without: Collection[PeerId], adapter: str | None = None, *, is_urgent: bool = False
    ) -> Servers:
        """Servers that may be used, measured as far as there is time."""
        usable = self._allowed(await self.directory.servers(), without, adapter)
        if find_gaps(((each.announcement.start, each.announcement.end) for each in usable.values()), start, end):
            # A server may have come a moment ago.
            with contextlib.suppress(NoPeersError, TimeoutError):
                async with asyncio.timeout(_URGENT_S if is_urgent else None):
                    await self.directory.refresh()
            usable = self._allowed(await self.directory.servers(), without, adapter)
        if not without and not is_urgent:
            await self.measurements.refresh(usable, start=start, end=end)
            if adapter is None:
                self.measurements.forget_others(usable.keys())
        return usable

    def _allowed(self, servers: Servers, without: Collection[PeerId], adapter: str | None) -> Servers:
        allowed = {
            peer_id: signed
            for peer_id, signed in servers.items()
            if peer_id not in without and self.options.excludes(signed) is None
        }
        return allowed if adapter is None else choose_servers(allowed, adapter)

    def _weigh(self, servers: Servers, *, cache_tokens: int = 0, batch_tokens: int | None = None) -> list[Server]:
        """What each server costs at the moment."""
        now_s = asyncio.get_running_loop().time()
        costs = []
        for peer_id, signed in servers.items():
            known = self.measurements.get(peer_id)
            costs.append(
                estimate_cost(
                    signed.announcement,
                    peer_id,
                    round_trip_s=None if known is None else known.round_trip_s,
                    penalty_s=self.health.penalty_s(peer_id, now_s=now_s),
                    num_sessions=None if known is None else known.num_sessions,
                    cache_tokens_left=self.cache_tokens_left(signed),
                    cache_tokens=cache_tokens,
                    batch_tokens=batch_tokens,
                    noise=self._rng.random(),
                )
            )
        return costs

    async def _weigh_one(self, peer_id: PeerId | None) -> Server | None:
        signed = None if peer_id is None else (await self.directory.servers()).get(peer_id)
        return None if signed is None else self._weigh({signed.peer_id: signed})[0]

    def cache_tokens_left(self, signed: SignedAnnouncement) -> int | None:
        """Room in a server's attention cache as it was last measured, or announced; None: nobody knows."""
        known = self.measurements.get(signed.peer_id)
        if known is None or known.cache_tokens_left is None:
            return signed.announcement.cache_tokens_left
        return known.cache_tokens_left

    async def _explain_missing(self, start: int, end: int, adapter: str | None = None) -> PetalsError:
        """Say whether it is the client's own demands that leave no chain."""
        if adapter is not None:
            known = await self.directory.servers()
            holding = [each.announcement for each in choose_servers(known, adapter).values()]
            if gaps := find_gaps(((each.start, each.end) for each in holding), start, end):
                return explain_missing_adapter(known.values(), adapter, describe_blocks(gaps), self.model_name)
        servers = (await self.directory.servers()).values()
        spans = [(signed.announcement.start, signed.announcement.end) for signed in servers]
        reasons = [self.options.excludes(signed) for signed in servers]
        allowed = [span for span, reason in zip(spans, reasons, strict=True) if reason is None]
        gaps = find_gaps(allowed, start, end)
        if find_gaps(spans, start, end) or not gaps:
            return await self.directory.explain_missing(start, end)
        excluded = sorted({reason for reason in reasons if reason is not None})
        return MissingBlocksError(
            f"{describe_blocks(gaps)} of {self.model_name} can be had only from servers with "
            f"{' and '.join(excluded)}, which this client's options exclude: allow more, or start a server"
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
        self.measurements.note_round_trip(peer_id, connection.rtt_s)
        return connection

    async def _connect_to_sound(self, signed: SignedAnnouncement) -> PeerConnection:
        """As ``connect``, for what no silent server is worth being waited for: not to who has failed since it was last
        of use."""
        if self.health.num_failures(signed.peer_id):
            raise PeerConnectionError("it has failed")
        return await self.connect(signed)

    def drop(self, connection: PeerConnection) -> None:
        """Close a connection whose other end has fallen silent; whoever uses it is told at once."""
        self._dialer.drop(connection)

    def round_trip_s(self, peer_id: PeerId) -> float | None:
        """What was measured for a server."""
        known = self.measurements.get(peer_id)
        return None if known is None else known.round_trip_s

    def rate_bytes_per_s(self, peer_id: PeerId) -> float | None:
        """How fast the link to a server takes bytes; None while nothing has had to wait."""
        connection = self._dialer.find(peer_id)
        return None if connection is None else connection.rate_bytes_per_s

    def blame(self, peer_id: PeerId, error: PetalsError) -> None:
        """Note a server's failure, so that the next plan avoids it. Who is about to stop is not at fault."""
        if isinstance(error, DrainingError):
            return
        self.health.record_failure(peer_id, error, now_s=asyncio.get_running_loop().time())
        _logger.info("server %s failed: %s", peer_id.short, error.message)

    def praise(self, peer_id: PeerId, *, took_s: float | None = None, expected_s: float | None = None) -> None:
        """Note a success; with both times, of the same request, also whether it was a slow one."""
        now_s = asyncio.get_running_loop().time()
        self.health.record_success(peer_id, now_s=now_s, took_s=took_s, expected_s=expected_s)

    def praise_work(
        self, signed: SignedAnnouncement, hop: Hop, *, num_tokens: int, took_s: float, spare_s: float = 0.0
    ) -> None:
        """Note that a server has computed tokens, and whether that took much longer than it announces.

        ``took_s`` may hold ``spare_s`` of other things.
        """
        token_s = announced_token_s(signed, hop, is_single=num_tokens <= MAX_DECODE_TOKENS)
        if token_s is None:
            self.praise(hop.peer_id)
        else:
            self.praise(hop.peer_id, took_s=took_s, expected_s=spare_s + num_tokens * token_s)

    def observe(self, signed: SignedAnnouncement, hop: Hop, *, num_tokens: int, took_s: float) -> None:
        """Note how long a server's part of a decode step took at most, to be told to others."""
        token_s = announced_token_s(signed, hop, is_single=True)
        if token_s is not None:
            known = self.measurements.get(hop.peer_id)
            num_sessions = 0 if known is None else known.num_sessions or 0
            busy = min(MAX_EXCUSE, 1 + SESSION_SHARE * num_sessions)
            expected_s = busy * num_tokens * token_s
            self._observations.note(hop.peer_id, expected_s=expected_s, took_s=took_s)

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


def announced_token_s(signed: SignedAnnouncement, hop: Hop, *, is_single: bool) -> float | None:
    """What a server says that it takes for a token, alone or of many, in the blocks of a hop; None: nothing."""
    announcement = signed.announcement
    rate = announcement.inference_tokens_per_s if is_single else announcement.forward_tokens_per_s
    return (hop.end - hop.start) / (announcement.end - announcement.start) / rate if rate else None


def explain_failure(hop: Hop, error: PetalsError) -> PetalsError:
    """Say which server failed, in the error's own class."""
    text = f"server {hop.peer_id.short} (blocks {hop.start}:{hop.end}) failed: {error.message}"
    return type(error)(text, retry_after_s=error.retry_after_s)


def explain_end(failure: PetalsError) -> PetalsError:
    """Say what to do about a server's ``failure`` when it was the last: others were tried, or there are none."""
    if failure.disposition is not Disposition.GO_ELSEWHERE:
        return failure
    text = f"{failure.message}; start another server of these blocks, or try again later"
    return type(failure)(text, retry_after_s=failure.retry_after_s)
