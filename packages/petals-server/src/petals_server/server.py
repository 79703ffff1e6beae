"""One server, from its configuration to its withdrawal."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from petals_core.addresses import Address
from petals_core.announcement import Announcement
from petals_core.errors import PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.limits import MAX_NAME_CHARS, MAX_OBSERVED
from petals_core.net.dialer import Dialer
from petals_core.net.listener import Listener
from petals_core.next_delays import NextDelays
from petals_core.wire.throttle import Throttle
from petals_dht.directory import Directory
from petals_dht.shards import ENOUGH_SERVERS
from petals_server.announcer import ANNOUNCE_TIMEOUT_S, Announcer
from petals_server.balancer import Balancer
from petals_server.comfort.guest import Guest, Served
from petals_server.comfort.ledger import ServedLedger
from petals_server.comfort.meter import make_meter
from petals_server.config import PlacementTiming, ServerConfig
from petals_server.contribution.book import ReceiptBook
from petals_server.contribution.desk import ContributionDesk
from petals_server.entrance import choose_host, open_entrance
from petals_server.first_span import first_span
from petals_server.holding import VERSION, Holding
from petals_server.neighbours import Neighbours
from petals_server.placement.moves import Move, MoveCost, MoveRules
from petals_server.placement.observation import Votes, lower_votes
from petals_server.placement.offers import Ability
from petals_server.status import ServerRecord

if TYPE_CHECKING:
    from petals_core.models.hashes import ProgressCallback
    from petals_server.loading import ServedModel

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S: Final = 10.0
_RELOAD_RETRY_S: Final = 30.0


class Server:
    """A server of one span of one model. ``start`` returns when it is announced and answers.

    Several may live in one process. Everything that takes long (imports of torch, loading, computing) happens in the
    thread that owns the device, so the event loop always answers.
    """

    def __init__(self, config: ServerConfig, progress: ProgressCallback | None = None) -> None:
        self.config = config
        self.address: Address
        """Where others reach the server, and join the swarm."""
        self._progress = progress
        self._resources = AsyncExitStack()
        self._directory: Directory
        self._listener: Listener
        self._identity: Identity
        self.holding: Holding
        """The blocks."""
        self._desk: ContributionDesk
        self._throttle: Throttle | None
        self._announcer: Announcer | None = None
        self._neighbours: Neighbours | None = None
        self._balancer: Balancer | None = None
        self._guest: Guest | None = None
        self.ledger = ServedLedger()
        """What was computed, and for whom."""
        self.num_moves = 0
        self.pause_reason = ""
        """Why it takes no work though it could; empty: it does."""
        self._started_at_s = time.time()

    @classmethod
    async def start(cls, config: ServerConfig, progress: ProgressCallback | None = None) -> Self:
        """Join, load, announce.

        Args:
            progress: called in the device's thread with what is being done, the bytes done, and the bytes in all.

        Raises:
            ConfigurationError: something in the configuration can't work; its subclasses tell model, device, memory.
            NoPeersError: none of the initial peers answers.
        """
        server = cls(config, progress)
        await server.__aenter__()
        return server

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(drain_timeout_s=0.0)

    @property
    def peer_id(self) -> PeerId:
        """The server's identity."""
        return self._identity.peer_id

    @property
    def model(self) -> ServedModel:
        """What is served."""
        return self.holding.handler.model

    @property
    def num_sessions(self) -> int:
        """Open sessions."""
        requests = self.holding.requests
        return 0 if requests is None else len(requests.sessions)

    @property
    def span(self) -> tuple[int, int]:
        """The blocks that are served, or loaded: first, and one past the last."""
        return self.holding.span

    @property
    def is_online(self) -> bool:
        """Whether it takes work."""
        return self.holding.is_online

    @property
    def cache_tokens_left(self) -> int:
        """Tokens of attention cache that no session has reserved."""
        return self.holding.handler.sessions.cache_tokens_left

    async def stop(self, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Take no new work, let what is open end within ``drain_timeout_s``, withdraw, and free everything.

        Idempotent; no task, thread or socket is left.
        """
        for task in (self._balancer, self._guest):
            if task is not None:
                await task.close()
        if self.holding.is_online:
            self.holding.drain()
            if drain_timeout_s > 0 and self._announcer is not None and self.holding.handler.num_requests:
                try:
                    async with asyncio.timeout(drain_timeout_s):
                        await self._announcer.announce()
                except (PetalsError, TimeoutError) as error:
                    log.info("could not tell the swarm that this server drains: %s", error)
            await self._listener.close(grace_s=drain_timeout_s)
        await self._resources.aclose()

    # --- starting -----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        config = self.config
        host = choose_host(config)
        if config.identity is None:
            self._identity = Identity.default("server")
            self._resources.callback(self._identity.release)
        else:
            self._identity = config.identity
        self._desk = ContributionDesk(
            self._identity, self.ledger, ReceiptBook(config.receipts), prefers=config.prefer_contributors
        )
        self._throttle = None if config.max_upload_bytes_per_s is None else Throttle(config.max_upload_bytes_per_s)
        dialer = Dialer(
            identity=self._identity,
            swarm_key=config.swarm_key,
            compression=config.compression,
            throttle=self._throttle,
        )
        self.holding = Holding(config, dialer=dialer, ledger=self.ledger, desk=self._desk)
        self._resources.push_async_callback(self.holding.close)
        self._resources.push_async_callback(dialer.close)
        await self._join(host)
        await self.holding.open(self.address, self._progress)
        self._announcer = Announcer(
            self._directory,
            self._identity,
            self._describe,
            interval_s=config.announce_interval_s,
            lifetime_s=config.announce_lifetime_s,
            rng=random.Random(),
        )
        self._resources.push_async_callback(self._announcer.stop)
        self.holding.span = await self._choose_blocks()
        if self._balancer is not None and config.initial_peers:
            await self._announcer.start()  # so that others that start see which blocks are taken
        await self.holding.load(*self.holding.span)
        await self._announce()

    async def _announce(self) -> None:
        """Tell the swarm, and do all that goes on in the background."""
        assert self._announcer is not None
        self._neighbours = Neighbours(
            lambda: self._directory.find_servers(self.holding.opened.fingerprint, wanted=ENOUGH_SERVERS),
            identity=self._identity,
            swarm_key=self.config.swarm_key,
            start=self.span[0],
            end=self.span[1],
            hidden_size=self.model.span.hidden_size,
            rng=random.Random(),
        )
        self._resources.push_async_callback(self._neighbours.close)
        await self._announcer.start()
        self._measure_neighbours()
        device = str(self.holding.opened.device) if self.config.pause_when_busy else None
        self._guest = Guest(self, schedule=self.config.schedule, meter=None if device is None else make_meter(device))
        self._resources.push_async_callback(self._guest.close)
        self._guest.start()
        if self._balancer is not None:
            self._hold()
            if self.config.placement is not None:
                self._balancer.start()

    def _measure_neighbours(self) -> None:
        """Begin to find out how far others are."""
        assert self._neighbours is not None
        assert self._announcer is not None
        self._neighbours.start(self._announcer.announce)

    async def _join(self, host: str | None) -> None:
        """Open the ports, join the directory, and see that others can connect."""
        entrance = await open_entrance(
            self.config,
            host,
            identity=self._identity,
            throttle=self._throttle,
            handler=self.holding.serve,
            resources=self._resources,
        )
        self._directory, self._listener, self.address = entrance.directory, entrance.listener, entrance.address

    async def _choose_blocks(self) -> tuple[int, int]:
        """Where to start: as told, or where the swarm needs it."""
        config, opened = self.config, self.holding.opened
        start, end = first_span(config, opened)
        num_blocks = end - start
        if config.blocks is not None or num_blocks == opened.num_blocks:
            return start, end
        self._balancer = Balancer(
            self,
            directory=self._directory,
            identity=self._identity,
            swarm_key=config.swarm_key,
            fingerprint=opened.fingerprint,
            num_blocks=opened.num_blocks,
            timing=config.placement or PlacementTiming(),
            rules=MoveRules(),
            rng=random.Random(),
        )
        view = await self._balancer.look()
        ability = self._ability(num_blocks, view.typical_tokens_per_s * num_blocks)
        window = view.coverage.choose_window(ability.offers)
        self.holding.span = (window.start, window.end)
        if config.initial_peers:
            window = await self._balancer.settle_start(view, window, ability)
        return window.start, window.end

    def _ability(self, max_blocks: int, block_tokens_per_s: float) -> Ability:
        return Ability(
            max_blocks=max_blocks,
            block_tokens_per_s=block_tokens_per_s,
            min_blocks=None if self.config.num_blocks is None else max_blocks,
        )

    # --- moving -------------------------------------------------------------------------------------------------------

    async def announce(self, *, timeout_s: float = ANNOUNCE_TIMEOUT_S) -> None:
        """Announce now; raises ``PetalsError`` if no other node keeps it."""
        assert self._announcer is not None
        await self._announcer.announce(timeout_s=timeout_s)

    def cost(self) -> MoveCost:
        """What a move to other blocks takes."""
        timing = self.config.placement or PlacementTiming()
        return MoveCost(fixed_s=timing.drain_s / 2, new_block_s=self.holding.load_s / (self.span[1] - self.span[0]))

    def votes(self) -> Votes:
        """What clients observed of other servers, and what was timed of those that may come next."""
        timed = () if self._neighbours is None else self._neighbours.percents
        return dict(lower_votes(self._desk.votes, {beginning: percent / 100 for beginning, percent in timed}))

    async def move(self, move: Move) -> None:
        """Hold other blocks: drain, unload, load, announce. Where they can't be loaded, hold the old ones again."""
        assert self._balancer is not None
        timing, before = self.config.placement or PlacementTiming(), self.span
        self.holding.leave()
        await self.announce(timeout_s=timing.settle_s)
        await self.holding.end_streams(timing.repair_drain_s if move.is_repair else timing.drain_s)
        span = (move.start, move.end)
        while True:
            try:
                await self.holding.replace(*span)
                break
            except PetalsError as error:
                log.error("could not load blocks %d:%d, going back: %s", *span, error)
                await asyncio.sleep(0 if span != before else _RELOAD_RETRY_S)
                span, self._balancer.intent = before, None
        assert self._neighbours is not None
        self._neighbours.hold(*span)
        self.num_moves += 1
        self._balancer.intent = None
        self._hold()
        await self.announce()
        log.info("serving blocks %d:%d now", *span)

    def _hold(self) -> None:
        """Tell the balancer what is held."""
        assert self._balancer is not None
        opened, (start, end) = self.holding.opened, self.holding.span
        rate, length = self.holding.observe_speed().decode_tokens_per_s, end - start
        most = self.config.num_blocks or max(length, min(opened.num_blocks, opened.num_blocks_that_fit))
        self._balancer.hold(start, end, rate, self._ability(most, rate * length))

    # --- pausing ------------------------------------------------------------------------------------------------------

    async def pause(self, reason: str) -> None:
        """Take no work, and let what is open end soon, until ``resume``; the blocks stay loaded."""
        self.pause_reason = reason
        await self.holding.pause()
        await self.announce()

    async def resume(self) -> None:
        """Take work again."""
        self.pause_reason = ""
        self.holding.resume()
        await self.announce()

    def served(self) -> Served:
        """What was done so far."""
        ledger = self.ledger
        return Served(
            num_requests=ledger.num_requests,
            num_tokens=ledger.num_tokens,
            num_peers=ledger.num_peers,
            num_sessions=self.num_sessions,
        )

    def record(self) -> ServerRecord:
        """How it is, for ``petals-server status``."""
        requests, opened, ledger = self.holding.requests, self.holding.opened, self.ledger
        state = "moving" if self.holding.is_moving else "loading" if requests is None else requests.state
        return ServerRecord(
            peer_id=str(self.peer_id),
            port=self._listener.port,
            address=str(self.address),
            pid=os.getpid(),
            model_name=_printable(opened.checkpoint.name),
            start=self.span[0],
            end=self.span[1],
            num_blocks=opened.num_blocks,
            state="paused" if self.pause_reason else state,
            pause_reason=self.pause_reason,
            started_at_s=self._started_at_s,
            saved_at_s=time.time(),
            num_sessions=self.num_sessions,
            num_requests=ledger.num_requests,
            num_tokens=ledger.num_tokens,
            block_tokens=ledger.block_tokens,
            num_peers=ledger.num_peers,
            num_moves=self.num_moves,
            tokens_per_s=0.0 if requests is None else requests.model.threads.decode_tokens_per_s,
            cache_tokens_left=0 if requests is None else max(0, requests.sessions.cache_tokens_left),
        )

    def _describe(self, now_s: float, expires_at_s: float) -> Announcement:
        opened, requests = self.holding.opened, self.holding.requests
        intent = None if self._balancer is None else self._balancer.intent
        facts: dict[str, Any] = {}
        if requests is None:
            facts["state"] = "draining" if self.holding.is_moving else "joining"
        else:
            info, speed = requests.info(), self.holding.observe_speed()
            facts = {
                "state": info.state,
                "inference_tokens_per_s": speed.decode_tokens_per_s,
                "forward_tokens_per_s": speed.forward_tokens_per_s,
                "cache_tokens_left": info.cache_tokens_left,
                "adapters": tuple(requests.model.adapters),
                "load": float(self.holding.engine.num_queued),
            }
        return Announcement(
            model_name=_printable(opened.checkpoint.name),
            fingerprint=opened.fingerprint,
            num_blocks=opened.num_blocks,
            start=self.span[0],
            end=self.span[1],
            addresses=(self.address,),
            torch_dtype=str(opened.dtype).removeprefix("torch."),
            quantization=opened.quantization,
            issued_at_s=now_s,
            expires_at_s=expires_at_s,
            version=VERSION,
            public_name=self.config.public_name,
            next_delays=NextDelays() if self._neighbours is None else self._neighbours.delays,
            intent=None if intent is None else (intent.start, intent.end),
            observed=tuple(
                (beginning, min(100, round(100 * share)))
                for beginning, share in itertools.islice(self.votes().items(), MAX_OBSERVED)
            ),
            intent_at_s=None if intent is None else intent.issued_at_s,
            **facts,
        )


def _printable(name: str) -> str:
    return "".join(character for character in name if character.isprintable())[:MAX_NAME_CHARS]
