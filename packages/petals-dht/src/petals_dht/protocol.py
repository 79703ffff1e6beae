"""Datagrams in and out of one node: requests answered, responses matched, the routing table kept.

The ``kademlia`` package (2.2.3) gives the base class and the buckets. What it does with bytes is replaced, because its
``datagram_received`` starts a task for every datagram, garbage raises inside those tasks, and a late answer to a
cancelled call raises too.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from kademlia.protocol import KademliaProtocol

from petals_core.identity import PeerId
from petals_core.schema import SchemaError
from petals_dht import messages
from petals_dht.contacts import (
    Contact,
    normalised_host,
    source_group,
)
from petals_dht.datagrams import (
    NONCE_BYTES,
    REQUEST_ID_BYTES,
    Datagram,
    DatagramError,
    DatagramSeal,
    Kind,
)
from petals_dht.messages import (
    CheckReachable,
    Ping,
    Pong,
    Reached,
    Request,
    Response,
)
from petals_dht.rates import RateLimiter
from petals_dht.responder import NodeLimits, Responder, Tokens
from petals_dht.routing import RoutingTable
from petals_dht.storage import Storage

log = logging.getLogger(__name__)
Reach = Callable[[str, int, PeerId], Awaitable[str]]
"""Connect to (host, port) and check that this peer listens there; returns "" or why not."""
_MAX_CALLS = 64
"""Requests that a node has under way at once, so that their answers find room in its socket."""
_COUNTED_S = 0.25
"""What was not answered for so long does not count any more: dead nodes hold up no requests to others."""
_MAX_ATTEMPT_TIMEOUT_S = 6.0
_MAX_UNSENT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response and the node that gave it."""

    contact: Contact
    response: Response
    is_client: bool


@dataclass(frozen=True, slots=True)
class _Pending:
    address: tuple[str, int]
    destination: bytes | None
    future: asyncio.Future[Answer]


class DirectoryProtocol(KademliaProtocol):
    """One node's end of the network. Nothing that arrives raises; what does not fit is counted in ``dropped``."""

    def __init__(
        self,
        own: Contact,
        storage: Storage,
        seal: DatagramSeal,
        *,
        is_client: bool,
        is_mapped: bool,
        families: frozenset[int],
        limits: NodeLimits,
        attempt_timeout_s: float,
        num_attempts: int,
        clock: Callable[[], float],
        reach: Reach | None,
    ) -> None:
        super().__init__(own, storage, limits.bucket_size)
        self.router = RoutingTable(own, limits.bucket_size)
        self.own = own
        self.is_client = is_client
        self.families = families
        self.dropped: Counter[str] = Counter()
        self.num_requests = 0
        """Requests of others that were answered."""
        self.num_sent = self.sent_bytes = 0
        """Datagrams sent, and their content."""
        self.max_sent_bytes = 0
        self.answered_at_s: dict[bytes, float] = {}
        """When a contact last answered, by loop time."""
        self.observed: dict[str, str] = {}
        """By source group of the observer, the host that it says our datagrams come from."""
        self.closed = asyncio.Event()
        self._seal = seal
        self._is_mapped = is_mapped
        self._limits = limits
        self._attempt_timeout_s = attempt_timeout_s
        self._num_attempts = num_attempts
        self._clock = clock
        self._reach = reach
        self._loop = asyncio.get_running_loop()
        self._calls = asyncio.Semaphore(_MAX_CALLS)
        self.recent_rtt_s = 0.0
        """The slowest of the recent answers, older ones counting less."""
        self._pending: dict[bytes, _Pending] = {}
        self._request_rates = RateLimiter(limits.request_rate)
        self._total_rate = RateLimiter(limits.total_request_rate)
        self._reach_rates = RateLimiter(limits.reach_rate)
        self._tokens = Tokens(os.urandom(32))
        self._responder = Responder(storage, self.router, limits, self._tokens)
        self._tasks: set[asyncio.Task[None]] = set()
        self._verifying: set[bytes] = set()
        self._num_reaches = 0

    def __getattr__(self, name: str) -> Any:
        """The package makes a remote call out of every unknown attribute; here a misspelt name is an error."""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    # --- from asyncio -------------------------------------------------------------------------------------------------

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        """Take one datagram from anybody."""
        try:
            datagram = self._seal.open(data, now_s=self._clock())
            source = Contact(datagram.sender, normalised_host(addr[0]), addr[1])
            if datagram.kind is Kind.RESPONSE:
                self._take_response(datagram, source)
            else:
                self._take_request(datagram, source)
        except DatagramError as error:
            self.dropped[error.reason] += 1
        except SchemaError:
            self.dropped["malformed"] += 1

    def error_received(self, exc: Exception) -> None:
        """A datagram could not be sent, which the missing answer will tell too."""
        self.dropped["unsent"] += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    # --- calls to others ----------------------------------------------------------------------------------------------

    async def call(
        self,
        address: tuple[str, int],
        request: Request,
        *,
        destination: bytes | None,
        timeout_s: float | None = None,
        num_attempts: int | None = None,
    ) -> Answer | None:
        """Send a request and wait for its response, repeating it if it seems to be lost; None if nobody answers.

        ``timeout_s`` is per attempt; by default it follows the slowest of the recent answers, so that a machine or
        network under load is not taken for dead. May be cancelled at any time; what arrives later is dropped.
        """
        is_counted = True

        def count_no_more() -> None:
            nonlocal is_counted
            if is_counted:
                is_counted = False
                self._calls.release()

        await self._calls.acquire()
        timer = self._loop.call_later(_COUNTED_S, count_no_more)
        try:
            return await self._call(address, request, destination, timeout_s, num_attempts or self._num_attempts)
        finally:
            timer.cancel()
            count_no_more()

    async def _call(
        self,
        address: tuple[str, int],
        request: Request,
        destination: bytes | None,
        timeout_s: float | None,
        num_attempts: int,
    ) -> Answer | None:
        request_id = os.urandom(REQUEST_ID_BYTES)
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._pending[request_id] = _Pending(address, destination, future)
        body = messages.encode(request)
        try:
            sent_at_s = self._loop.time()
            for _ in range(num_attempts):
                self._send(Kind.REQUEST, request_id, destination, body, address)
                patience_s = min(max(self._attempt_timeout_s, 3 * self.recent_rtt_s), _MAX_ATTEMPT_TIMEOUT_S)
                done, _ = await asyncio.wait((future,), timeout=timeout_s or patience_s)
                if done:
                    if timeout_s is None:
                        self.recent_rtt_s = max(self._loop.time() - sent_at_s, 0.9 * self.recent_rtt_s)
                    return future.result()
            return None
        finally:
            del self._pending[request_id]
            future.cancel()

    async def call_contact(self, contact: Contact, request: Request) -> Answer | None:
        """As ``call``, to a node whose id is known: it enters the routing table if it answers and leaves it if not."""
        answer = await self.call(contact.address, request, destination=contact.id)
        if answer is None:
            self.router.remove(contact)
            self.answered_at_s.pop(contact.id, None)
        return answer

    async def call_ping(self, contact: Contact) -> Answer | None:
        """Ask a known node for a sign of life."""
        return await self.call_contact(contact, Ping())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` until it ends or the node closes."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    async def cancel_tasks(self) -> None:
        """End everything that this node still does."""
        while self._tasks:
            tasks = tuple(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the directory failed", exc_info=task.exception())

    def _send(
        self, kind: Kind, request_id: bytes, destination: bytes | None, body: bytes, address: tuple[str, int]
    ) -> None:
        content = self._seal.seal(
            Datagram(
                kind=kind,
                request_id=request_id,
                sender=self.own.id,
                destination=destination,
                is_client=self.is_client,
                body=body,
            ),
            now_s=self._clock(),
            nonce=os.urandom(NONCE_BYTES),
        )
        if self.transport.is_closing() or self.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            self.dropped["unsent"] += 1
            return
        self.num_sent += 1
        self.sent_bytes += len(content)
        self.max_sent_bytes = max(self.max_sent_bytes, len(content))
        host, port = address
        self.transport.sendto(content, (f"::ffff:{host}" if self._is_mapped and ":" not in host else host, port))

    def _take_response(self, datagram: Datagram, source: Contact) -> None:
        pending = self._pending.get(datagram.request_id)
        if pending is None or pending.future.done() or source.address != pending.address:
            raise DatagramError("unexpected response")
        if pending.destination not in (None, source.id):
            raise DatagramError("unexpected response")
        response = messages.decode_response(datagram.body)
        if isinstance(response, Pong | Reached):
            self._observe(source, response.host)
        pending.future.set_result(Answer(contact=source, response=response, is_client=datagram.is_client))
        if not datagram.is_client:
            self._welcome(source)

    def _observe(self, source: Contact, host: str) -> None:
        try:
            self.observed[source_group(source.host)] = normalised_host(host)
        except ValueError:
            raise DatagramError("malformed") from None
        while len(self.observed) > 64:
            self.observed.pop(next(iter(self.observed)))

    # --- the routing table --------------------------------------------------------------------------------------------

    def _welcome(self, contact: Contact) -> None:
        """Enter a node that has answered us."""
        self.answered_at_s[contact.id] = self._loop.time()
        known = self.router.get(contact.id)
        if known is not None and known != contact:
            self._verify(contact)
            return
        silent = self.router.add(contact)
        if silent is not None:
            self._verify(silent)
        if len(self.answered_at_s) > 4 * len(self.router) + 64:
            known_ids = {known.id for known in self.router.contacts()}
            self.answered_at_s = {key: at for key, at in self.answered_at_s.items() if key in known_ids}

    def _verify(self, contact: Contact) -> None:
        """Ping a contact, so that it enters the routing table or leaves it.

        Only who answers at its address is ever told to others: the source of a request may be forged, or lie behind a
        NAT. An id that is known at another address keeps that one as long as it answers there.
        """
        if contact.id in self._verifying or len(self._verifying) >= self._limits.max_verifications:
            return
        self._verifying.add(contact.id)
        self.spawn(self._ping_newcomer(contact))

    async def _ping_newcomer(self, contact: Contact) -> None:
        try:
            known = self.router.get(contact.id)
            if known is not None and known != contact and await self.call_ping(known) is not None:
                return
            await self.call_ping(contact)
        finally:
            self._verifying.discard(contact.id)

    # --- requests of others -------------------------------------------------------------------------------------------

    def _take_request(self, datagram: Datagram, source: Contact) -> None:
        if self.is_client:
            raise DatagramError("client")
        if not self._request_rates.admit(source_group(source.host), now_s=self._loop.time()):
            raise DatagramError("rate")
        if not self._total_rate.admit("", now_s=self._loop.time()):
            raise DatagramError("busy")
        request = messages.decode_request(datagram.body)
        if datagram.destination is None and not isinstance(request, Ping):
            raise DatagramError("no destination")
        self.num_requests += 1
        if isinstance(request, CheckReachable):
            self._start_reach(datagram, source, request)
        else:
            response = self._responder.answer(source, request, now_s=self._clock(), at_s=self._loop.time())
            self._respond(datagram, source, response)
        if datagram.destination is not None and not datagram.is_client and not self.router.knows(source):
            self._verify(source)

    def _respond(self, datagram: Datagram, source: Contact, response: Response) -> None:
        body = messages.encode(response)
        self._send(Kind.RESPONSE, datagram.request_id, datagram.sender, body, source.address)

    def _start_reach(self, datagram: Datagram, source: Contact, request: CheckReachable) -> None:
        if not self._tokens.check(request.token, source.host, at_s=self._loop.time()):
            refusal = "the token is not from here, or old"
        elif self._reach is None:
            refusal = "this node makes no connections"
        elif self._num_reaches >= self._limits.max_reaches or not self._reach_rates.admit(
            source_group(source.host), now_s=self._loop.time()
        ):
            refusal = "too many checks at once"
        else:
            self._num_reaches += 1
            self.spawn(self._try_reach(datagram, source, request, self._reach))
            return
        self._respond(datagram, source, Reached(host=source.host, reason=refusal))

    async def _try_reach(self, datagram: Datagram, source: Contact, request: CheckReachable, reach: Reach) -> None:
        """Connect to the very host that asked, never to another one."""
        try:
            reason = await reach(source.host, request.port, PeerId(request.peer_id))
        finally:
            self._num_reaches -= 1
        line = "".join(character if character.isprintable() else " " for character in reason)[:200]
        self._respond(datagram, source, Reached(host=source.host, is_reachable=not reason, reason=line))
