"""One node of the swarm's distributed hash table."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from petals_core.addresses import Address
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import InvalidAnnouncementError, NoPeersError
from petals_core.identity import Identity
from petals_core.swarm_key import SwarmKey
from petals_dht.contacts import Contact, distance, may_be_told, node_id, unpack_contacts
from petals_dht.crawl import Crawl
from petals_dht.datagrams import DatagramSeal, ReplayWindow
from petals_dht.messages import Find, FindNode, Found, Nodes, Ping, Store, Stored
from petals_dht.protocol import Answer, DirectoryProtocol, Reach
from petals_dht.reading import read_pages
from petals_dht.responder import NodeLimits
from petals_dht.sockets import bind_udp, families_of, resolve
from petals_dht.storage import Storage, StorageLimits, slot_of
from petals_dht.verification import Verifier, untimely_by_s

log = logging.getLogger(__name__)
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_RESTORE_PATIENCE_S = 4.0
_MIN_PATIENCE_S = 0.25
_MIN_READING_PATIENCE_S = 0.5
_GRACE_S = 0.02
_PLACES_S = 240.0
"""How long nodes nearest to a key are offered announcements without a new search: less than their tokens hold."""
_MAX_PLACES = 16
_ENOUGH_PLACES = 0.75
"""A smaller part of them that keeps an announcement calls for a new search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTiming:
    """How long a node waits."""

    attempt_timeout_s: float = 1.5
    """How long one datagram may stay unanswered."""
    num_attempts: int = 2
    maintenance_interval_s: float = 60.0
    """Between two rounds of sweeping, of pinging contacts that are silent and of going back to the initial peers."""
    silence_s: float = 120.0
    """A contact that has not answered for so long is pinged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What came of offering an announcement."""

    num_nodes: int
    """So many keep it, or a later one of its slot."""
    later: SignedAnnouncement | None
    """The latest one that is kept in its place; None if it is the latest."""


class Node:
    """A UDP node: keeps announcements for others, and finds and stores them. Made by ``start``, ended by ``close``.

    A client (``is_client``) does the latter only: it answers nobody, keeps nothing and is in nobody's routing table.
    """

    def __init__(
        self,
        protocol: DirectoryProtocol,
        transport: asyncio.DatagramTransport,
        *,
        port: int,
        storage: Storage,
        verifier: Verifier,
        initial_peers: Sequence[Address],
        limits: NodeLimits,
        timing: NodeTiming,
        clock: Callable[[], float],
    ) -> None:
        self.protocol = protocol
        self.port = port
        self.storage = storage
        self.initial_peers = tuple(initial_peers)
        self.clock = clock
        self._verifier = verifier
        self._transport = transport
        self._limits = limits
        self._timing = timing
        self._places: dict[bytes, tuple[list[tuple[Contact, bytes]], float]] = {}
        """Per key the nodes that announcements were offered to, and when they were found, by loop time."""
        self._refused: deque[bytes] = deque(maxlen=16)
        """The last entries that others gave us and that were not good."""

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
        join_timeout_s: float = 20.0,
        reach: Reach | None = None,
        limits: NodeLimits | None = None,
        storage_limits: StorageLimits | None = None,
        timing: NodeTiming | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Listen on UDP ``host:port`` (or on ``sock``, a bound UDP socket that is closed with the node) and join.

        ``contacts`` are nodes known from before: if one of them answers, initial peers need not.
        Without either the node is the first of a swarm. ``host`` None is every address of the machine.
        ``clock`` gives Unix time in seconds. ``reach`` lets the node check for others whether they can be reached.

        Raises:
            ConfigurationError: the port is in use or the host is not this machine's.
            NoPeersError: none of the initial peers answered within ``join_timeout_s``.
        """
        limits, timing = limits or NodeLimits(), timing or NodeTiming()
        if sock is None:
            sock = bind_udp(host, port)
        bound_port: int = sock.getsockname()[1]
        families = families_of(sock)
        own = Contact(node_id(identity.peer_id), "", bound_port)
        verifier = Verifier()
        storage = Storage(storage_limits, verifier)
        window = ReplayWindow(started_at_s=clock())
        try:
            transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: DirectoryProtocol(
                    own,
                    storage,
                    DatagramSeal(own.id, swarm_key, window),
                    is_client=is_client,
                    is_mapped=families == {4, 6},
                    families=families,
                    limits=limits,
                    attempt_timeout_s=timing.attempt_timeout_s,
                    num_attempts=timing.num_attempts,
                    clock=clock,
                    reach=reach,
                ),
                sock=sock,
            )
        except BaseException:
            sock.close()
            raise
        node = cls(
            protocol,
            transport,
            port=bound_port,
            storage=storage,
            verifier=verifier,
            initial_peers=initial_peers,
            limits=limits,
            timing=timing,
            clock=clock,
        )
        try:
            if not (contacts and await node.restore(contacts)):
                await node.join(timeout_s=join_timeout_s)
        except BaseException:
            await node.close()
            raise
        protocol.spawn(node._maintain_regularly())
        return node

    async def close(self) -> None:
        """Stop at once; nothing is left behind."""
        await self.protocol.cancel_tasks()
        self._transport.close()
        await self.protocol.closed.wait()

    # --- joining and staying ------------------------------------------------------------------------------------------

    async def join(self, *, timeout_s: float) -> None:
        """Get to know the swarm through the initial peers, asking again until one answers or the time is up.

        Raises:
            NoPeersError: none answered.
        """
        if not self.initial_peers:
            return
        reasons: dict[Address, str] = {}
        try:
            async with asyncio.timeout(timeout_s):
                pause_s = _FIRST_PAUSE_S
                while not await self._greet(self.initial_peers, reasons):
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except TimeoutError:
            tried = ", ".join(f"{peer} ({reasons.get(peer, 'no answer')})" for peer in self.initial_peers)
            raise NoPeersError(
                f"no initial peer answered within {timeout_s:g} s: {tried}; check that one of them runs, that UDP "
                "reaches its port, that both sides use the same swarm key or none, and that their clocks agree"
            ) from None
        # Who answers later than that comes into the routing table all the same.
        await self.nearest_nodes(self.protocol.own.id, min_patience_s=_MIN_PATIENCE_S)

    async def restore(self, contacts: Sequence[Contact]) -> bool:
        """Greet nodes known from before; True as soon as one answers. The others are greeted in the background."""
        outcome: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        async def greet(contact: Contact) -> None:
            if await self.protocol.call_ping(contact) is not None and not outcome.done():
                outcome.set_result(True)

        async def greet_all() -> None:
            try:
                await asyncio.gather(*(greet(contact) for contact in contacts))
            finally:
                if not outcome.done():
                    outcome.set_result(False)
            await self.maintain()
            await self.nearest_nodes(self.protocol.own.id)

        self.protocol.spawn(greet_all())
        done, _ = await asyncio.wait((outcome,), timeout=_RESTORE_PATIENCE_S)
        return bool(done) and outcome.result()

    async def _greet(self, peers: Iterable[Address], reasons: dict[Address, str]) -> bool:
        """Ping all at once, by address only; True as soon as one of them is known."""
        found = asyncio.Event()

        async def greet(address: tuple[str, int]) -> None:
            answer = await self.protocol.call(address, Ping(), destination=None, timeout_s=0.5, num_attempts=2)
            if answer is not None:
                found.set()

        greetings: list[asyncio.Task[None]] = []
        for peer in peers:
            addresses = await resolve(peer, self.protocol.families)
            unusable = (
                "no such host" if peer.ip is None else f"an IPv{peer.ip.version} address, which we do not listen on"
            )
            reasons[peer] = "no answer" if addresses else unusable
            greetings += [asyncio.create_task(greet(address)) for address in addresses]
        waiting = asyncio.create_task(found.wait())
        try:
            pending: set[asyncio.Task[object]] = {*greetings}
            while pending and not found.is_set():
                _, pending = await asyncio.wait({*pending, waiting}, return_when=asyncio.FIRST_COMPLETED)
                pending.discard(waiting)
        finally:
            for task in (*greetings, waiting):
                task.cancel()
            await asyncio.gather(*greetings, waiting, return_exceptions=True)
        return found.is_set()

    async def _maintain_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._timing.maintenance_interval_s)
            await self.maintain()

    async def maintain(self) -> None:
        """Drop what has expired, ping silent contacts, return to initial peers that were lost, refresh idle buckets."""
        self.storage.sweep(now_s=self.clock())
        router = self.protocol.router
        before_s = asyncio.get_running_loop().time() - self._timing.silence_s
        silent = [
            contact for contact in router.contacts() if self.protocol.answered_at_s.get(contact.id, 0.0) <= before_s
        ]
        await asyncio.gather(*(self.protocol.call_ping(contact) for contact in silent))
        known = {contact.address for contact in router.contacts()}
        lost = [
            address
            for peer in self.initial_peers
            for address in await resolve(peer, self.protocol.families)
            if address not in known and address[1] != self.port
        ]
        was_alone = not len(router)
        await asyncio.gather(*(self._return_to(address) for address in lost))
        if was_alone and len(router):
            await self.nearest_nodes(self.protocol.own.id)
        for key in self.protocol.get_refresh_ids():
            await self.nearest_nodes(key)

    async def _return_to(self, address: tuple[str, int]) -> None:
        """Make ourselves known to an initial peer that has been restarted, say."""
        answer = await self.protocol.call(address, Ping(), destination=None)
        if answer is not None:
            await self.protocol.call_ping(answer.contact)

    # --- searching ----------------------------------------------------------------------------------------------------

    async def nearest_nodes(
        self,
        key: bytes,
        *,
        min_patience_s: float | None = None,
        on_lull: Callable[[list[tuple[Contact, bytes]]], None] | None = None,
    ) -> list[tuple[Contact, bytes]]:
        """The nodes nearest to ``key`` that answer, each with its token, the nearest first.

        ``on_lull`` is given what was found so far when only such are waited for that take long, or are dead.
        """
        tokens: dict[Contact, bytes] = {}

        def found(crawl: Crawl) -> list[tuple[Contact, bytes]]:
            return [(contact, tokens[contact]) for contact in crawl.nearest()]

        async def ask(contact: Contact) -> list[Contact] | None:
            answer = await self.protocol.call_contact(contact, FindNode(key=key))
            if answer is None or not isinstance(answer.response, Nodes):
                return None
            tokens[contact] = answer.response.token
            return self._told(answer, answer.response)

        crawl = await self._crawl(
            key,
            ask,
            min_patience_s=min_patience_s or self._timing.attempt_timeout_s,
            on_lull=None if on_lull is None else lambda crawl: on_lull(found(crawl)),
        )
        return found(crawl)

    async def find(self, key: bytes, *, timeout_s: float = 10.0) -> list[SignedAnnouncement]:
        """All announcements under ``key`` that the nearest nodes keep, verified, the winner of each slot.

        What was found when the time is up is returned.

        Raises:
            NoPeersError: no other node answered, though there should be some.
        """
        if not len(self.protocol.router) and self.initial_peers:
            await self.join(timeout_s=timeout_s)
        # Whoever answers gives what many have stored.
        limits = StorageLimits(max_entries_per_source=StorageLimits().max_entries_per_key)
        found = Storage(limits, self._verifier)
        for signed in self.storage.announcements(key, now_s=self.clock()):
            self._collect(found, key, signed.encoded, "127.0.0.1")
        pages: dict[Contact, Found] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._find(key, found, pages)
        if not pages and self.initial_peers:
            raise NoPeersError("no node of the swarm answers any more: check the network connection")
        return found.announcements(key, now_s=self.clock())

    async def _find(self, key: bytes, found: Storage, pages: dict[Contact, Found]) -> None:
        async def ask(contact: Contact) -> list[Contact] | None:
            answer = await self.protocol.call_contact(contact, Find(key=key))
            if answer is None or not isinstance(answer.response, Found):
                return None
            pages[contact] = answer.response
            for encoded in answer.response.entries:
                self._collect(found, key, encoded, contact.host)
            return self._told(answer, answer.response)

        crawl = await self._crawl(key, ask, min_patience_s=_MIN_PATIENCE_S)
        own_digest = self.storage.page(key, now_s=self.clock(), max_bytes=0).digest
        holders: dict[bytes, list[Contact]] = {}
        for contact in crawl.nearest():
            page = pages[contact]
            if page.next is not None and page.digest != own_digest:
                holders.setdefault(page.digest, []).append(contact)
        await read_pages(
            self.protocol,
            key,
            {digest: [(contact, pages[contact]) for contact in contacts] for digest, contacts in holders.items()},
            lambda contact, encoded: self._collect(found, key, encoded, contact.host),
            patience_s=max(_MIN_READING_PATIENCE_S, 4 * self.protocol.recent_rtt_s),
        )

    def _collect(self, found: Storage, key: bytes, encoded: bytes, host: str) -> bool:
        """Add an entry that somebody gave us; True if it is good and new."""
        try:
            return found.store(key, encoded, source_host=host, now_s=self.clock())
        except InvalidAnnouncementError:
            self.protocol.dropped["announcement"] += 1
            self._refused.append(encoded)
            return False

    async def store(self, key: bytes, encoded: bytes, *, timeout_s: float = 15.0) -> int:
        """As ``offer``; returns only how many nodes keep the announcement."""
        return (await self.offer(key, encoded, timeout_s=timeout_s)).num_nodes

    async def offer(self, key: bytes, encoded: bytes, *, timeout_s: float = 15.0) -> Kept:
        """Keep an announcement at the nodes nearest to ``key``, this one included.

        Nodes that were found a few minutes ago are not searched for again as long as most of them keep it. Nobody gets
        it later because others are slow or dead.

        Raises:
            InvalidAnnouncementError: it is not valid (any more), or not for this key.
            NoPeersError: no other node keeps it, though there should be some.
        """
        slot_of(key, self._verifier.decode(encoded, now_s=self.clock()))
        outcomes: list[Stored | None] = []
        """Of each other node what it said; None for no answer."""
        is_kept_here = False

        async def store_at(contact: Contact, token: bytes) -> None:
            answer = await self.protocol.call_contact(contact, Store(key=key, token=token, entry=encoded))
            response = None if answer is None else answer.response
            outcomes.append(response if isinstance(response, Stored) else None)

        def store_here(nearest: Sequence[tuple[Contact, bytes]]) -> None:
            nonlocal is_kept_here
            if not self.protocol.is_client and self._is_near(key, nearest):
                self.storage.store(key, encoded, source_host="127.0.0.1", now_s=self.clock())
                is_kept_here = True

        async def search_and_store() -> None:
            storing: dict[Contact, asyncio.Task[None]] = {}

            def store_at_all(nearest: Sequence[tuple[Contact, bytes]]) -> None:
                for contact, token in nearest:
                    if contact not in storing:
                        storing[contact] = asyncio.create_task(store_at(contact, token))

            outcomes.clear()
            try:
                nearest = await self.nearest_nodes(key, on_lull=store_at_all)
                self._remember_places(key, nearest)
                store_here(nearest)
                store_at_all(nearest)
                await asyncio.gather(*storing.values())
            finally:
                for task in storing.values():
                    task.cancel()
                await asyncio.gather(*storing.values(), return_exceptions=True)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                known = self._known_places(key)
                if known is not None:
                    store_here(known)
                    await asyncio.gather(*(store_at(contact, token) for contact, token in known))
                if known is None or _num_kept(outcomes) < _ENOUGH_PLACES * len(known):
                    await search_and_store()
        num_kept = _num_kept(outcomes)
        if not num_kept and (self.initial_peers or not is_kept_here):
            reasons = Counter("no answer" if outcome is None else outcome.reason for outcome in outcomes)
            why = reasons.most_common(1)[0][0] if reasons else "none answers; check the network connection"
            raise NoPeersError(f"no other node of the swarm keeps the announcement: {why}")
        return Kept(num_nodes=num_kept + is_kept_here, later=self._latest(outcomes))

    def _known_places(self, key: bytes) -> list[tuple[Contact, bytes]] | None:
        """The nodes nearest to ``key`` as they were found lately, with tokens that still hold; None if not known.

        In a swarm with few nodes every new one counts, so these are searched for each time.
        """
        nearest, found_at_s = self._places.get(key, ([], 0.0))
        is_fresh = asyncio.get_running_loop().time() - found_at_s < _PLACES_S
        return nearest if is_fresh and len(nearest) >= self._limits.bucket_size else None

    def _remember_places(self, key: bytes, nearest: list[tuple[Contact, bytes]]) -> None:
        self._places.pop(key, None)
        self._places[key] = (nearest, asyncio.get_running_loop().time())
        while len(self._places) > _MAX_PLACES:
            del self._places[next(iter(self._places))]

    def _latest(self, outcomes: Iterable[Stored | None]) -> SignedAnnouncement | None:
        """The latest of the announcements that nodes keep instead of the one that was offered."""
        found: list[SignedAnnouncement] = []
        for outcome in outcomes:
            if outcome is not None and outcome.later is not None:
                with contextlib.suppress(InvalidAnnouncementError):
                    found.append(self._verifier.decode(outcome.later, now_s=self.clock()))
        return max(found, key=lambda signed: signed.announcement.issued_at_s, default=None)

    def _is_near(self, key: bytes, nearest: Sequence[tuple[Contact, bytes]]) -> bool:
        """Whether this node is among the nearest to ``key`` itself."""
        if len(nearest) < self._limits.bucket_size:
            return True
        return distance(self.protocol.own.id, key) < distance(nearest[-1][0].id, key)

    async def _crawl(
        self,
        key: bytes,
        ask: Callable[[Contact], Awaitable[list[Contact] | None]],
        *,
        min_patience_s: float,
        on_lull: Callable[[Crawl], None] | None = None,
    ) -> Crawl:
        """Search for the nodes nearest to ``key``.

        A node that takes several times as long as others did gives up its place: others are asked beside it. Once
        somebody has answered, and it has had at least ``min_patience_s``, its answer is left out.
        """
        loop = asyncio.get_running_loop()
        seeds = self.protocol.router.nearest(key, self._limits.bucket_size)
        crawl = Crawl(key, seeds, own_id=self.protocol.own.id, width=self._limits.bucket_size)
        under_way: dict[asyncio.Task[list[Contact] | None], tuple[Contact, float]] = {}
        stalled: set[Contact] = set()
        slowest_s: float | None = None
        try:
            while not crawl.is_done:
                for contact in crawl.take():
                    under_way[asyncio.ensure_future(ask(contact))] = (contact, loop.time())
                if on_lull is not None and all(contact in stalled for contact, _ in under_way.values()):
                    on_lull(crawl)
                usual_s = self.protocol.recent_rtt_s if slowest_s is None else slowest_s
                stall_s = max(_MIN_PATIENCE_S, 4 * usual_s)
                patience_s = math.inf if slowest_s is None else max(min_patience_s, 4 * slowest_s)
                next_at_s = min(
                    at_s + (patience_s if contact in stalled else min(stall_s, patience_s))
                    for contact, at_s in under_way.values()
                )
                timeout_s = None if math.isinf(next_at_s) else max(0.0, next_at_s - loop.time())
                done, _ = await asyncio.wait(under_way, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    # Where it was this process that paused, the answers are there and only have to be read.
                    done, _ = await asyncio.wait(under_way, timeout=_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    contact, at_s = under_way.pop(task)
                    contacts = task.result()
                    if contacts is None:
                        crawl.failed(contact)
                    else:
                        crawl.answered(contact, contacts)
                        slowest_s = max(slowest_s or 0.0, loop.time() - at_s)
                for task, (contact, at_s) in [] if done else list(under_way.items()):
                    waited_s = loop.time() - at_s
                    if waited_s >= patience_s:
                        del under_way[task]
                        crawl.failed(contact)
                        self.protocol.spawn(_ignore(task))
                    elif waited_s >= stall_s and contact not in stalled:
                        stalled.add(contact)
                        crawl.stalled(contact)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
        return crawl

    def _told(self, answer: Answer, response: Nodes | Found) -> list[Contact]:
        """The contacts in a response that may be asked."""
        contacts = unpack_contacts(response.contacts_4, response.contacts_6)
        return [
            contact
            for contact in contacts
            if may_be_told(contact, by=answer.contact.host)
            and (6 if ":" in contact.host else 4) in self.protocol.families
        ]

    def num_answering(self) -> int:
        """Contacts that answered lately."""
        since_s = asyncio.get_running_loop().time() - self._timing.silence_s
        answered_at_s = self.protocol.answered_at_s
        return sum(answered_at_s.get(contact.id, 0.0) > since_s for contact in self.protocol.router.contacts())

    def suspected_clock_offset_s(self) -> float | None:
        """By how much this machine's clock seems to be behind (positive) or ahead; None if nothing speaks for that.

        Worth asking only when nothing but refused entries was found: some may be of servers whose clock is wrong.
        """
        offsets = (untimely_by_s(encoded, now_s=self.clock()) for encoded in self._refused)
        known = [offset for offset in offsets if offset is not None]
        return statistics.median(known) if known else None

    def observed_host(self) -> str | None:
        """The host that most others see our datagrams come from; None if nobody has told."""
        counts = Counter(self.protocol.observed.values())
        return counts.most_common(1)[0][0] if counts else None


async def _ignore(task: asyncio.Task[list[Contact] | None]) -> None:
    """Wait for an answer that comes too late, so that a dead node leaves the routing table."""
    await task


def _num_kept(outcomes: Iterable[Stored | None]) -> int:
    return sum(outcome is not None and outcome.is_kept for outcome in outcomes)
