"""One node of the swarm's distributed hash table."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from petals_core.addresses import Address
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import InvalidAnnouncementError, NoPeersError
from petals_core.identity import Identity
from petals_core.swarm_key import SwarmKey
from petals_dht.contacts import Contact, distance, node_id
from petals_dht.datagrams import DatagramSeal, ReplayWindow
from petals_dht.messages import Find, Found, Ping
from petals_dht.offering import Kept, Offering
from petals_dht.protocol import DirectoryProtocol, Reach
from petals_dht.reading import Holder, Reader
from petals_dht.responder import NodeLimits
from petals_dht.search import MIN_PATIENCE_S, Place, Search
from petals_dht.sockets import bind_udp, families_of, resolve
from petals_dht.storage import Storage, StorageLimits
from petals_dht.verification import Verifier, untimely_by_s

log = logging.getLogger(__name__)
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_RESTORE_PATIENCE_S = 4.0
_MIN_READING_PATIENCE_S = 0.5


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


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found under a key."""

    announcements: tuple[SignedAnnouncement, ...]
    total: int
    """How many there are by what the nodes nearest to the key say: the median."""


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
        self._timing = timing
        self._width = limits.bucket_size
        self._search = Search(protocol, width=limits.bucket_size, patience_s=timing.attempt_timeout_s)
        self._offering = Offering(
            protocol,
            self._search,
            storage,
            verifier,
            width=limits.bucket_size,
            is_first=not initial_peers,
            clock=clock,
        )
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
        await self.nearest_nodes(self.protocol.own.id, min_patience_s=MIN_PATIENCE_S)

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

    async def nearest_nodes(self, key: bytes, *, min_patience_s: float | None = None) -> list[Place]:
        """The nodes nearest to ``key`` that answer, each with its token, the nearest first."""
        return await self._search.nearest_nodes(key, min_patience_s=min_patience_s)

    async def find(self, key: bytes, *, max_total: int | None = None, timeout_s: float = 10.0) -> Findings:
        """All announcements under ``key`` that the nearest nodes keep, verified, the winner of each slot.

        What was found when the time is up is returned. Where there are more than ``max_total``, only some are.

        Raises:
            NoPeersError: no other node answered, though there should be some.
        """
        if not len(self.protocol.router) and self.initial_peers:
            await self.join(timeout_s=timeout_s)
        # Whoever answers gives what many have stored.
        limits = StorageLimits(max_entries_per_source=StorageLimits().max_entries_per_key)
        found = Storage(limits, self._verifier)
        own = self.storage.announcements(key, now_s=self.clock())
        for signed in own:
            self._collect(found, key, signed.encoded, "127.0.0.1")
        pages: dict[Contact, Found] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._find(key, found, pages, max_total)
        if not pages and self.initial_peers:
            raise NoPeersError("no node of the swarm answers any more: check the network connection")
        return Findings(
            tuple(found.announcements(key, now_s=self.clock())),
            total_of(key, pages, width=self._width) if pages else len(own),
        )

    async def _find(self, key: bytes, found: Storage, pages: dict[Contact, Found], max_total: int | None) -> None:
        async def ask(contact: Contact) -> list[Contact] | None:
            answer = await self.protocol.call_contact(contact, Find(key=key))
            if answer is None or not isinstance(answer.response, Found):
                return None
            pages[contact] = answer.response
            for encoded in answer.response.entries:
                self._collect(found, key, encoded, contact.host)
            return self._search.told(answer, answer.response)

        async def read(contact: Contact, request: Find) -> Found | None:
            answer = await self.protocol.call_contact(contact, request)
            return answer.response if answer is not None and isinstance(answer.response, Found) else None

        crawl = await self._search.crawl(key, ask)
        nearest = {contact: pages[contact] for contact in crawl.nearest()}
        if max_total is not None and nearest and total_of(key, nearest, width=self._width) > max_total:
            return
        own_digest = self.storage.page(key, now_s=self.clock(), max_bytes=0).digest
        reader = Reader(
            read,
            key,
            [
                Holder(contact, page.total, page.digest)
                for contact, page in nearest.items()
                if page.next is not None and page.digest != own_digest
            ],
            lambda contact, encoded: self._collect(found, key, encoded, contact.host),
            patience_s=max(_MIN_READING_PATIENCE_S, 4 * self.protocol.recent_rtt_s),
        )
        await reader.read()

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
        """Keep an announcement at the nodes nearest to ``key``, this one included: see ``Offering.offer``."""
        return await self._offering.offer(key, encoded, timeout_s=timeout_s)

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


def total_of(key: bytes, pages: Mapping[Contact, Found], *, width: int) -> int:
    """How many entries a key has by the ``width`` nearest nodes: those asked on the way to them keep none."""
    nearest = sorted(pages, key=lambda contact: distance(contact.id, key))[:width]
    return statistics.median_low(pages[contact].total for contact in nearest)
