"""Finds a server its place in the swarm, at start and for as long as it runs.

The rules are in ``petals_server.placement``; here they meet the directory. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Collection
from typing import Final, Protocol

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.net.dialer import Dialer
from petals_core.net.rpc import call
from petals_core.net.tasks import BackgroundTasks
from petals_core.swarm_key import SwarmKey
from petals_core.wire.messages import Info, InfoRequest
from petals_dht.directory import Directory
from petals_server.announcer import ANNOUNCE_TIMEOUT_S
from petals_server.config import PlacementTiming
from petals_server.placement.coverage import Placed, Window
from petals_server.placement.intents import Intent, find_yielding, holds, may_leave, may_propose
from petals_server.placement.joining import choose_together
from petals_server.placement.moves import Move, MoveCost, MoveRules, check_interval_s, consider_move, is_settled
from petals_server.placement.observation import Votes
from petals_server.placement.offers import Ability
from petals_server.placement.view import View, look, only_holders

log = logging.getLogger(__name__)

MAX_ASKED: Final = 16
"""Servers that are asked at one look whether they answer."""
_ASK_TIMEOUT_S: Final = 2.0
_FIND_TIMEOUT_S: Final = 30.0
"""For all servers of a model, which may be ten thousand; nothing waits for it but a move."""
_PROPOSAL_SHARE: Final = 0.5
"""Of the time to settle, that announcing may take; looking took some before."""


class Host(Protocol):
    """What a balancer needs of its server."""

    @property
    def is_online(self) -> bool:
        """Whether it takes work."""

    async def announce(self, *, timeout_s: float = ANNOUNCE_TIMEOUT_S) -> None:
        """Announce now, the balancer's ``intent`` too; raises ``PetalsError`` if nobody keeps it."""

    async def move(self, move: Move) -> None:
        """Drain, load the other blocks, and announce them."""

    def cost(self) -> MoveCost:
        """What a move takes, as far as it is known."""

    def votes(self) -> Votes:
        """What was observed of other servers."""


class Balancer:
    """Chooses the span of one server and changes it when the swarm needs that more."""

    def __init__(
        self,
        host: Host,
        *,
        directory: Directory,
        identity: Identity,
        swarm_key: SwarmKey | None,
        fingerprint: str,
        num_blocks: int,
        timing: PlacementTiming,
        rules: MoveRules,
        rng: random.Random,
    ) -> None:
        self.intent: Intent | None = None
        """To be announced."""
        self._host = host
        self._directory = directory
        self._identity = identity
        self._swarm_key = swarm_key
        self._fingerprint = fingerprint
        self._num_blocks = num_blocks
        self._timing = timing
        self._rules = rules
        self._rng = rng
        self._held: Placed | None = None
        self._ability: Ability | None = None
        self._since_s = 0.0
        self._silent: dict[bytes, float] = {}
        """Servers that did not answer, and when they had announced themselves last."""
        self._tasks = BackgroundTasks()

    # --- starting -----------------------------------------------------------------------------------------------------

    async def look(self) -> View:
        """The other servers as they announce themselves."""
        return self._weigh(await self._find())

    async def settle_start(self, view: View, window: Window, ability: Ability) -> Window:
        """Agree with others that start at the same time who takes what; ``window`` is what this one would take alone.

        ``intent`` is set and announced meanwhile. Where all blocks are held and nobody else starts, nothing needs to be
        agreed.
        """
        if not view.joining and not view.coverage.is_dark.any():
            return window
        self.intent = self._intent(window.start, window.end)
        try:
            await self._host.announce(timeout_s=_PROPOSAL_SHARE * self._timing.settle_s)
            await asyncio.sleep(self._timing.settle_s)
            view = await self.look()
            if view.joining:
                window = choose_together(
                    view.settled,
                    [*view.joining, self.intent],
                    ability,
                    peer_id=self.intent.peer_id,
                    tokens_per_s=view.typical_tokens_per_s,
                )
        finally:
            self.intent = None
        return window

    def start(self) -> None:
        """Consider moving from time to time."""
        self._tasks.start(self._check_regularly(), name="petals balancer")

    async def close(self) -> None:
        """Consider no more."""
        await self._tasks.close()

    def hold(self, start: int, end: int, tokens_per_s: float, ability: Ability) -> None:
        """Tell what the server holds now, and what it could."""
        self._held = Placed(peer_id=self._identity.peer_id.digest, start=start, end=end, tokens_per_s=tokens_per_s)
        self._ability = ability
        self._since_s = asyncio.get_running_loop().time()

    # --- moving -------------------------------------------------------------------------------------------------------

    async def check(self) -> int:
        """Look at the swarm, and move if that helps; returns how many servers there are."""
        loop, me, ability = asyncio.get_running_loop(), self._held, self._ability
        assert me is not None
        assert ability is not None
        await self._ask(found := await self._find(), self._choose_asked(self._weigh(found), me))
        began_s = loop.time()
        view = self._weigh(await self._find())
        others = view.coverage
        everybody = others.copy()
        everybody.add(me)
        if is_settled(everybody, self._rules):
            return everybody.num_servers
        move = consider_move(
            others,
            me,
            ability.some_offers(me.end - me.start, (self._rng.random(), self._rng.random())),
            cost=self._host.cost(),
            stayed_s=began_s - self._since_s,
            num_moving=len(view.intents),
            rules=self._rules,
            servers=view.steady,
        )
        if move is not None:
            intent = self._intent(move.start, move.end, source=(me.start, me.end))
            if may_propose(intent.region, view.intents):
                await self._propose(intent, move, me, began_s, {each.peer_id for each in view.intents})
        return everybody.num_servers

    async def _propose(
        self, intent: Intent, move: Move, me: Placed, began_s: float, seen_before: Collection[bytes]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.intent = intent
        is_moving = False
        try:
            # Nodes that have just left would hold it up.
            await self._host.announce(timeout_s=_PROPOSAL_SHARE * self._timing.settle_s)
            # Only what was announced quickly is sure to be seen by all rivals: see petals_server.placement.intents.
            if loop.time() - began_s <= self._timing.settle_s:
                await asyncio.sleep(self._timing.settle_s)
                found = await self._find()
                blocks = range(me.start, me.end)
                await self._ask(found, only_holders(self._weigh(found).servers, blocks))
                view = self._weigh(found)
                view = self._weigh(found, find_yielding(intent, view.intents, seen_before=seen_before))
                is_moving = holds(intent, view.intents) and may_leave(
                    me,
                    (move.start, move.end),
                    view.coverage,
                    min_witnesses=move.min_witnesses,
                    reloads=not move.is_repair,
                )
            if is_moving:
                why = "to light blocks that nobody holds" if move.is_repair else "where they are needed more"
                log.info("moving from blocks %d:%d to %d:%d, %s", me.start, me.end, move.start, move.end, why)
                await self._host.move(move)
        finally:
            self.intent = None
            if not is_moving:
                try:
                    await self._host.announce()
                except PetalsError as error:
                    log.debug("could not take an intent back: %s", error.message)

    async def _check_regularly(self) -> None:
        num_servers = 1  # until the first look: that one comes soon
        while True:
            interval_s = check_interval_s(num_servers, base_s=self._timing.interval_s)
            await asyncio.sleep(interval_s * self._rng.uniform(0.5, 1.5))
            if not self._host.is_online:  # it pauses
                continue
            try:
                num_servers = await self.check()
            except PetalsError as error:
                log.debug("the swarm could not be looked at: %s", error.message)
            except Exception:
                log.exception("considering other blocks failed")

    def _intent(self, start: int, end: int, source: tuple[int, int] = (0, 0)) -> Intent:
        peer_id = self._identity.peer_id.digest
        return Intent(peer_id=peer_id, start=start, end=end, issued_at_s=time.time(), source=source)

    # --- looking ------------------------------------------------------------------------------------------------------

    async def _find(self) -> dict[PeerId, SignedAnnouncement]:
        servers = await self._directory.find_servers(self._fingerprint, timeout_s=_FIND_TIMEOUT_S)
        return {signed.peer_id: signed for signed in servers if signed.peer_id != self._identity.peer_id}

    def _weigh(self, found: dict[PeerId, SignedAnnouncement], staying: Collection[bytes] = ()) -> View:
        # Who announces itself again after it was silent is believed again.
        self._silent = {
            peer_id.digest: self._silent[peer_id.digest]
            for peer_id, signed in found.items()
            if peer_id.digest in self._silent and signed.announcement.issued_at_s <= self._silent[peer_id.digest]
        }
        return look(
            {peer_id.digest: signed.announcement for peer_id, signed in found.items()},
            num_blocks=self._num_blocks,
            silent=self._silent,
            staying=staying,
            own_votes=self._host.votes(),
        )

    def _choose_asked(self, view: View, me: Placed) -> set[bytes]:
        """Those on which our blocks depend, and some others."""
        asked = sorted(only_holders(view.servers, range(me.start, me.end)))[: MAX_ASKED // 2]
        rest = [server.peer_id for server in view.steady if server.peer_id not in asked]
        return {*asked, *self._rng.sample(rest, min(len(rest), MAX_ASKED - len(asked)))}

    async def _ask(self, found: dict[PeerId, SignedAnnouncement], peer_ids: Collection[bytes]) -> None:
        """Ask servers what they hold; who does not answer, or holds something else, counts as silent."""
        asked = [signed for peer_id, signed in found.items() if peer_id.digest in peer_ids]
        if not asked:
            return
        dialer = Dialer(identity=self._identity, swarm_key=self._swarm_key, connect_timeout_s=_ASK_TIMEOUT_S)
        try:
            await asyncio.gather(*(self._ask_one(dialer, signed) for signed in asked))
        finally:
            await dialer.close()

    async def _ask_one(self, dialer: Dialer, signed: SignedAnnouncement) -> None:
        announced = signed.announcement
        try:
            async with asyncio.timeout(2 * _ASK_TIMEOUT_S):
                connection = await dialer.connect(announced.addresses, peer_id=signed.peer_id)
                reply = await call(connection, InfoRequest(), reply=Info, timeout_s=_ASK_TIMEOUT_S)
        except (PetalsError, TimeoutError) as error:
            log.debug("server %s does not answer: %s", signed.peer_id.short, error)
        else:
            info = reply.body
            assert isinstance(info, Info)
            if (info.start, info.end) == (announced.start, announced.end) and info.fingerprint == self._fingerprint:
                return
        self._silent[signed.peer_id.digest] = announced.issued_at_s
