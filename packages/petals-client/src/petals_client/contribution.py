"""A client's part in the records of who computed for whom. Belongs to one event loop.

It signs for what each server computed for it, shows what its owner's server computed for others, and tells what it saw
of servers' speed. Nothing waits for that, and a server that takes no part in it is used all the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import InvalidRequestError, PetalsError
from petals_core.identity import Identity, PeerId, receipts_path
from petals_core.limits import MAX_RECEIPTS_SHOWN
from petals_core.net.connection import PeerConnection
from petals_core.net.rpc import call
from petals_core.net.tasks import BackgroundTasks
from petals_core.observation import Observations
from petals_core.receipts import MAX_FILE_BYTES, Receipt, Statement, choose_largest, endorse
from petals_core.routing.graph import Hop
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Contribution, ContributionNoted

_logger = logging.getLogger(__name__)

SETTLE_S: Final = 30.0
"""How often a client signs for what was computed since."""
SHOW_S: Final = 600.0
"""How often it shows a server what its owner's server gave."""
_TIMEOUT_S: Final = 5.0
_CLOSE_TIMEOUT_S: Final = 0.5
_MAX_SERVERS: Final = 256
_NONCE_BYTES: Final = 16


class ContributionTab:
    """What servers computed for this client that it has not signed for yet."""

    def __init__(
        self,
        identity: Identity,
        *,
        connect: Callable[[SignedAnnouncement], Awaitable[PeerConnection]],
        observations: Observations,
        owner: Identity | None = None,
        receipts: Path | None = None,
    ) -> None:
        """``owner`` is the server whose owner this client belongs to; its receipts lie at ``receipts``, or where
        ``petals-server`` keeps them."""
        self.weights: dict[PeerId, float] = {}
        """What servers said of this client's weight in their fair shares."""
        self.signed_block_tokens = 0
        """Tokens times blocks that servers have signed for too."""
        self._identity = identity
        self._connect = connect
        self._observations = observations
        self._owner = owner
        self._receipts = receipts
        self._unsigned: OrderedDict[PeerId, tuple[SignedAnnouncement, int]] = OrderedDict()
        self._shown_at_s: dict[PeerId, float] = {}
        self._settling: asyncio.Task[None] | None = None
        self._tasks = BackgroundTasks()

    def note(self, server: SignedAnnouncement, hop: Hop, num_tokens: int) -> None:
        """Note that a server has computed so many tokens through a hop's blocks; never blocks."""
        _, before = self._unsigned.get(hop.peer_id, (server, 0))
        self._unsigned[hop.peer_id] = (server, before + num_tokens * (hop.end - hop.start))
        if len(self._unsigned) > _MAX_SERVERS:
            self._unsigned.popitem(last=False)
        if self._settling is None:
            self._settling = self._tasks.start(self._settle_regularly(), name="petals receipts")
        if self._owner is not None and hop.peer_id not in self._shown_at_s:
            self._shown_at_s[hop.peer_id] = asyncio.get_running_loop().time()
            self._tasks.start(self._show(server, hop.peer_id), name="petals contribution")

    async def settle(self) -> None:
        """Sign for everything now."""
        now_s = asyncio.get_running_loop().time()
        self._shown_at_s = {peer: at_s for peer, at_s in self._shown_at_s.items() if now_s < at_s + SHOW_S}
        await asyncio.gather(*(self._sign(peer_id) for peer_id in list(self._unsigned)))

    async def close(self) -> None:
        """Sign for what is left, if that is quick, and end."""
        if self._unsigned:
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self.settle()
            except TimeoutError:
                _logger.debug("no time to sign for what servers computed last")
        await self._tasks.close()

    async def _settle_regularly(self) -> None:
        while self._unsigned:
            await asyncio.sleep(SETTLE_S)
            await self.settle()
        self._settling = None

    async def _sign(self, peer_id: PeerId) -> None:
        server, block_tokens = self._unsigned.pop(peer_id)
        statement = Statement(
            server_key=server.public_key,
            client_key=self._identity.public_key,
            nonce=os.urandom(_NONCE_BYTES),
            block_tokens=block_tokens,
            signed_at_s=time.time(),
        )
        receipt = Receipt.sign(statement, self._identity)
        observed = self._observations.percents()
        try:
            noted = await self._tell(server, Contribution(receipt=receipt.encoded, observed=observed))
            whole = Receipt.decode(noted.receipt or b"", now_s=time.time())
        except PetalsError as error:
            # It may have been restarted; and what nobody has signed for only it has lost.
            _logger.debug("server %s signs no receipt: %s", peer_id.short, error.message)
            return
        if whole.statement == statement and whole.server_signature is not None:
            self.signed_block_tokens += block_tokens
        self.weights[peer_id] = noted.weight

    async def _show(self, server: SignedAnnouncement, peer_id: PeerId) -> None:
        assert self._owner is not None
        path = receipts_path(self._owner.peer_id) if self._receipts is None else self._receipts
        try:
            given = await asyncio.to_thread(_read_largest, path, self._owner.peer_id)
            if given:
                word = endorse(self._owner, self._identity.peer_id)
                noted = await self._tell(server, Contribution(endorsement=word, given=tuple(given)))
                self.weights[peer_id] = noted.weight
        except PetalsError as error:
            _logger.debug("server %s takes no receipts: %s", peer_id.short, error.message)

    async def _tell(self, server: SignedAnnouncement, message: Contribution) -> ContributionNoted:
        connection = await self._connect(server)
        reply = await call(
            connection, message, reply=ContributionNoted, priority=Priority.BACKGROUND, timeout_s=_TIMEOUT_S
        )
        assert isinstance(reply.body, ContributionNoted)
        return reply.body


def _read_largest(path: Path, server: PeerId) -> list[bytes]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InvalidRequestError(f"receipts in {path} can't be read: {error.strerror or error}") from error
    return choose_largest(content, server, limit=MAX_RECEIPTS_SHOWN, now_s=time.time())
