"""The directory of a swarm: which servers hold which blocks of which model."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from petals_core.addresses import Address
from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.errors import ConfigurationError, InvalidRequestError, NoPeersError
from petals_core.identity import Identity, PeerId
from petals_core.limits import MAX_ANNOUNCEMENT_LIFETIME_S
from petals_core.next_delays import NextDelays
from petals_core.swarm_key import SwarmKey
from petals_dht.contacts import MODELS_KEY, Contact, model_key
from petals_dht.node import Node, NodeTiming
from petals_dht.offering import Kept
from petals_dht.overview import ModelSummary
from petals_dht.protocol import Reach
from petals_dht.reachability import Reachability, check_reachable
from petals_dht.responder import NodeLimits
from petals_dht.shards import DIGITS, MAX_DEPTH, MAX_WHOLE, is_crowded, is_enough, is_sparse, is_split, key_of
from petals_dht.storage import StorageLimits, wins

_LISTING_INTERVAL_S = 240.0
_LANES = 4
"""Keys below one key that are read at the same time."""
_LISTING_LIFETIME_S = 600.0
"""How long a model stays on the list after its last server was heard of, at most."""


class Directory:
    """Announces servers and finds them. Made by ``start`` (a full node) or ``connect`` (a read-only client).

    All methods may run concurrently and be cancelled at any time.
    """

    def __init__(self, node: Node, identity: Identity) -> None:
        self.node = node
        self.identity = identity
        self._given_at_s = -math.inf
        """When the latest announcement of this peer was issued that was given to this directory."""
        self._issued_at_s = -math.inf
        """The same, as it was dated in the end."""
        self._listed_at_s: dict[str, float] = {}
        """When a model was put on the list, by loop time."""
        self._depths: dict[PeerId, int] = {}
        """Of the last peer that was announced, how many keys below that of its model are used."""
        self._digits = random.sample(DIGITS, len(DIGITS))
        """The order in which parts of a large model's servers are looked at."""

    @classmethod
    async def connect(
        cls,
        initial_peers: Sequence[Address],
        *,
        swarm_key: SwarmKey | None = None,
        timeout_s: float = 20.0,
        identity: Identity | None = None,
        timing: NodeTiming | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Join as a client, which keeps nothing for others and is in nobody's routing table.

        Raises:
            ConfigurationError: there are no initial peers.
            NoPeersError: none of them answered within ``timeout_s``.
        """
        if not initial_peers:
            raise ConfigurationError("no initial peers: give the address of a peer with --initial-peers HOST:PORT")
        identity = identity or Identity.ephemeral()
        node = await Node.start(
            identity,
            swarm_key=swarm_key,
            is_client=True,
            initial_peers=initial_peers,
            join_timeout_s=timeout_s,
            timing=timing,
            clock=clock,
        )
        return cls(node, identity)

    @classmethod
    async def start(
        cls,
        identity: Identity,
        host: str | None = None,
        port: int = 0,
        *,
        sock: socket.socket | None = None,
        swarm_key: SwarmKey | None = None,
        is_client: bool = False,
        initial_peers: Sequence[Address] = (),
        contacts: Sequence[Contact] = (),
        timeout_s: float = 20.0,
        reach: Reach | None = None,
        limits: NodeLimits | None = None,
        storage_limits: StorageLimits | None = None,
        timing: NodeTiming | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Start a node, as ``Node.start`` does, and use it.

        Raises:
            ConfigurationError: the port is in use or the host is not this machine's.
            NoPeersError: there are initial peers and none of them answered within ``timeout_s``.
        """
        node = await Node.start(
            identity,
            host,
            port,
            sock=sock,
            swarm_key=swarm_key,
            is_client=is_client,
            initial_peers=initial_peers,
            contacts=contacts,
            join_timeout_s=timeout_s,
            reach=reach,
            limits=limits,
            storage_limits=storage_limits,
            timing=timing,
            clock=clock,
        )
        return cls(node, identity)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the network; what was announced stays until it expires, unless ``withdraw`` took it back."""
        await self.node.close()

    @property
    def port(self) -> int:
        """The UDP port."""
        return self.node.port

    @property
    def initial_peers(self) -> tuple[Address, ...]:
        """The addresses that this node joined by."""
        return self.node.initial_peers

    def observed_host(self) -> str | None:
        """The IP address that most peers see our datagrams come from; None if nobody has told."""
        return self.node.observed_host()

    def suspected_clock_offset_s(self) -> float | None:
        """By how much this machine's clock seems to be behind (positive) or ahead; None if nothing speaks for that.

        Worth asking only when nothing was found.
        """
        return self.node.suspected_clock_offset_s()

    async def announce(self, signed: SignedAnnouncement, *, timeout_s: float = 15.0) -> int:
        """Make an announcement known until it expires, in place of earlier ones; returns how many nodes keep it.

        Servers call this again well before the expiry: nobody else does. What it could do within ``timeout_s`` counts.
        Where nodes keep one from this peer's life before a restart that was issued later, since a clock was set back,
        the announcement is dated behind that.

        Raises:
            InvalidAnnouncementError: it has expired, say.
            NoPeersError: no other node keeps it, though there should be some.
        """
        is_own, given_at_s = signed.peer_id == self.identity.peer_id, signed.announcement.issued_at_s
        if is_own and self._given_at_s < given_at_s <= self._issued_at_s:
            signed = self._redated(signed, after_s=self._issued_at_s)
        (num_kept, later), _ = await asyncio.gather(
            self._offer(signed, timeout_s=timeout_s), self._list_model(signed, timeout_s=timeout_s)
        )
        if not is_own:
            return num_kept
        self._given_at_s = max(self._given_at_s, given_at_s)
        self._issued_at_s = max(self._issued_at_s, signed.announcement.issued_at_s)
        later_at_s = -math.inf if later is None else later.announcement.issued_at_s
        if later_at_s <= self._issued_at_s:
            return num_kept
        signed = self._redated(signed, after_s=later_at_s)
        self._issued_at_s = signed.announcement.issued_at_s
        return (await self._offer(signed, timeout_s=timeout_s))[0]

    async def _offer(self, signed: SignedAnnouncement, *, timeout_s: float) -> tuple[int, SignedAnnouncement | None]:
        """Offer an announcement under the model's key, and where that is crowded under those below it.

        Returns how many nodes keep it where most do, and the latest one that is kept in its place.
        """
        fingerprint, peer_id = signed.announcement.fingerprint, signed.peer_id
        kept: list[Kept] = []

        async def offer(depth: int) -> Kept:
            return await self.node.offer(key_of(fingerprint, peer_id, depth), signed.encoded, timeout_s=timeout_s)

        known = self._depths.get(peer_id, 0)
        kept += await asyncio.gather(*(offer(depth) for depth in range(known + 1)))
        while is_crowded(kept[-1].total) and len(kept) <= MAX_DEPTH:
            kept.append(await offer(len(kept)))
        depth = len(kept) - 1
        while depth and is_sparse(kept[depth - 1].total):
            depth -= 1
        self._depths = {peer_id: depth}
        num_kept = max(each.num_nodes for each in kept)
        if not num_kept:
            raise NoPeersError("no node has room for the announcement: too many come from this address")
        later = [each.later for each in kept if each.later is not None]
        return num_kept, max(later, key=lambda each: each.announcement.issued_at_s, default=None)

    def _redated(self, signed: SignedAnnouncement, *, after_s: float) -> SignedAnnouncement:
        """The same announcement of this peer as if it had been issued right after ``after_s``."""
        announcement = signed.announcement
        issued_at_s = after_s + 1e-3
        lifetime_s = announcement.expires_at_s - announcement.issued_at_s
        redated = dataclasses.replace(
            announcement,
            issued_at_s=issued_at_s,
            # Rounding must not make it longer than is allowed.
            expires_at_s=issued_at_s + min(lifetime_s, MAX_ANNOUNCEMENT_LIFETIME_S - 1e-3),
        )
        return SignedAnnouncement.sign(redated, self.identity)

    async def _list_model(self, signed: SignedAnnouncement, *, timeout_s: float) -> None:
        """Put the model on the list, unless that was done lately.

        What goes there is signed anew, with a longer life and in a state in which nobody uses a server. So the nodes
        that keep the list hear seldom from each of thousands of servers.
        """
        announcement = signed.announcement
        if announcement.state == "offline":
            return
        if signed.peer_id == self.identity.peer_id:
            now_s = asyncio.get_running_loop().time()
            if now_s - self._listed_at_s.get(announcement.fingerprint, -math.inf) < _LISTING_INTERVAL_S:
                return
            listing = dataclasses.replace(
                announcement,
                state="joining",
                issued_at_s=announcement.issued_at_s - 1e-3,
                expires_at_s=announcement.issued_at_s + _LISTING_LIFETIME_S,
                addresses=(),
                adapters=(),
                next_delays=NextDelays(),
            )
            await self.node.store(
                MODELS_KEY, SignedAnnouncement.sign(listing, self.identity).encoded, timeout_s=timeout_s
            )
            self._listed_at_s = {announcement.fingerprint: now_s}
        else:
            await self.node.store(MODELS_KEY, signed.encoded, timeout_s=timeout_s)

    async def withdraw(self, announcement: Announcement | SignedAnnouncement, *, timeout_s: float = 5.0) -> int:
        """Tell that this peer's server has left; from now on nobody finds it. Returns how many nodes know.

        The note stays as long as any earlier announcement may, so that none of them comes back.

        Raises:
            InvalidRequestError: the announcement was signed by another peer.
            NoPeersError: no node keeps the note.
        """
        if isinstance(announcement, SignedAnnouncement):
            if announcement.peer_id != self.identity.peer_id:
                raise InvalidRequestError("only the peer that announced can withdraw")
            announcement = announcement.announcement
        # A clock that was set back must not make the note older than what it is to replace.
        issued_at_s = max(self.node.clock(), announcement.issued_at_s + 1e-3)
        offline = dataclasses.replace(
            announcement,
            state="offline",
            issued_at_s=issued_at_s,
            expires_at_s=issued_at_s + MAX_ANNOUNCEMENT_LIFETIME_S,
            next_delays=NextDelays(),
        )
        return await self.announce(SignedAnnouncement.sign(offline, self.identity), timeout_s=timeout_s)

    async def find_servers(
        self, fingerprint: str, *, wanted: int | None = None, now: float | None = None, timeout_s: float = 10.0
    ) -> list[SignedAnnouncement]:
        """The live servers of a model: verified announcements, one per peer, none of servers that have left.

        ``wanted``: of a model with many more servers, about so many at random will do, several for each block; this
        directory then always looks among the same. ``now`` is Unix time; by default the directory's clock says.

        Raises:
            NoPeersError: no node of the swarm answers.
        """
        now_s = self.node.clock() if now is None else now
        found: dict[PeerId, SignedAnnouncement] = {}
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        await self._find_below(fingerprint, "", found, wanted, deadline_s=deadline_s)
        return [
            signed
            for signed in found.values()
            if signed.announcement.expires_at_s > now_s and signed.announcement.state != "offline"
        ]

    async def _find_below(
        self,
        fingerprint: str,
        prefix: str,
        found: dict[PeerId, SignedAnnouncement],
        wanted: int | None,
        *,
        deadline_s: float,
    ) -> None:
        """Find servers whose peer ids begin with ``prefix``."""
        may_go_deeper = len(prefix) < MAX_DEPTH
        findings = await self.node.find(
            model_key(fingerprint, prefix),
            max_total=MAX_WHOLE if wanted is not None and may_go_deeper else None,
            timeout_s=max(0.0, deadline_s - asyncio.get_running_loop().time()),
        )
        for signed in findings.announcements:
            known = found.get(signed.peer_id)
            if known is None or wins(signed, known):
                found[signed.peer_id] = signed
        if not may_go_deeper or not is_split(findings.total):
            return

        async def descend(digits: Iterable[str]) -> None:
            for digit in digits:
                is_late = asyncio.get_running_loop().time() >= deadline_s
                if not is_late and (wanted is None or not is_enough(found.values(), wanted)):
                    await self._find_below(fingerprint, prefix + digit, found, wanted, deadline_s=deadline_s)

        lanes = _LANES if wanted is None else 1
        await asyncio.gather(*(descend(self._digits[lane::lanes]) for lane in range(lanes)))

    async def list_models(self, *, now: float | None = None, timeout_s: float = 10.0) -> list[ModelSummary]:
        """The models that servers have announced, by name; their last server may have left since.

        Raises:
            NoPeersError: no node of the swarm answers.
        """
        now_s = self.node.clock() if now is None else now
        findings = await self.node.find(MODELS_KEY, timeout_s=timeout_s)
        announcements = [signed.announcement for signed in findings.announcements]
        return sorted(
            ModelSummary(entry.model_name, entry.fingerprint, entry.num_blocks, entry.expires_at_s)
            for entry in announcements
            if entry.expires_at_s > now_s
        )

    async def check_reachable(self, port: int, peer_id: PeerId) -> Reachability:
        """Let up to three peers try to connect to this machine at TCP ``port`` and to meet ``peer_id`` there.

        The first that could decides. Nobody is waited for longer than 8 s.
        """
        return await check_reachable(self.node, port, peer_id)
