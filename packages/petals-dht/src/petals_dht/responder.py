"""What a node answers to requests, without time or network."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import assert_never

from petals_core.errors import InvalidAnnouncementError
from petals_dht.contacts import Contact, pack_contacts, source_group
from petals_dht.datagrams import MAX_BODY_BYTES
from petals_dht.messages import PAGE_BYTES, TOKEN_BYTES, Find, FindNode, Found, Nodes, Ping, Pong, Store, Stored
from petals_dht.rates import Rate, RateLimiter
from petals_dht.routing import RoutingTable
from petals_dht.storage import FIRST_SLOT, LAST_SLOT, Storage

FOUND_BYTES = 144
"""A ``Found`` without entries and contacts."""
_TOKEN_PERIOD_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLimits:
    """Bounds on what a node does for others, per source (an IPv4 address or an IPv6 /64 network) and together."""

    bucket_size: int = 20
    """Kademlia's k: contacts per bucket, and nodes that keep an announcement."""
    request_rate: Rate = field(default=Rate(per_s=200, burst=2000))
    total_request_rate: Rate = field(default=Rate(per_s=5000, burst=20_000))
    """Of all sources together, so that a forged crowd can't make this node flood others with answers."""
    store_rate: Rate = field(default=Rate(per_s=50, burst=500))
    reach_rate: Rate = field(default=Rate(per_s=0.2, burst=5))
    max_reaches: int = 8
    """Connections under way at once to check that others can be reached."""
    max_verifications: int = 64
    """Newcomers that are pinged at once before they enter the routing table."""


class Tokens:
    """Proofs that their holder receives datagrams at an address: valid for 5 to 10 minutes (compare BEP 5)."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def issue(self, host: str, *, at_s: float) -> bytes:
        """The token of a host. ``at_s`` is monotonic time."""
        period = int(at_s / _TOKEN_PERIOD_S)
        return hmac.digest(self._secret, f"{host} {period}".encode(), hashlib.sha256)[:TOKEN_BYTES]

    def check(self, token: bytes, host: str, *, at_s: float) -> bool:
        """Whether the host was given this token lately."""
        return any(hmac.compare_digest(token, self.issue(host, at_s=at_s - age_s)) for age_s in (0.0, _TOKEN_PERIOD_S))


class Responder:
    """Answers from one node's storage and routing table. ``now_s`` is Unix time, ``at_s`` monotonic time."""

    def __init__(self, storage: Storage, router: RoutingTable, limits: NodeLimits, tokens: Tokens) -> None:
        self._storage = storage
        self._router = router
        self._limits = limits
        self._tokens = tokens
        self._stores = RateLimiter(limits.store_rate)

    def answer(
        self, source: Contact, request: Ping | FindNode | Find | Store, *, now_s: float, at_s: float
    ) -> Pong | Nodes | Found | Stored:
        """The response to a request of ``source``."""
        match request:
            case Ping():
                return Pong(host=source.host, port=source.port, token=self._tokens.issue(source.host, at_s=at_s))
            case FindNode():
                contacts_4, contacts_6 = self._nearest(source, request.key)
                token = self._tokens.issue(source.host, at_s=at_s)
                return Nodes(token=token, contacts_4=contacts_4, contacts_6=contacts_6)
            case Find():
                return self._find(source, request, now_s=now_s, at_s=at_s)
            case Store():
                return self._store(source, request, now_s=now_s, at_s=at_s)
            case _:
                assert_never(request)

    def _nearest(self, source: Contact, key: bytes) -> tuple[bytes, bytes]:
        return pack_contacts(self._router.nearest(key, self._limits.bucket_size, without=source.id))

    def _find(self, source: Contact, request: Find, *, now_s: float, at_s: float) -> Found:
        """A page of what is kept; the first page has the nearest contacts too, and what entries they leave room for."""
        contacts_4, contacts_6 = (b"", b"") if request.after is not None else self._nearest(source, request.key)
        room = MAX_BODY_BYTES - len(contacts_4) - len(contacts_6) - FOUND_BYTES
        page = self._storage.page(
            request.key,
            now_s=now_s,
            max_bytes=min(PAGE_BYTES, room),
            after=request.after or FIRST_SLOT,
            until=request.until or LAST_SLOT,
        )
        return Found(
            token=self._tokens.issue(source.host, at_s=at_s),
            entries=page.entries,
            total=page.total,
            digest=page.digest,
            next=page.next,
            contacts_4=contacts_4,
            contacts_6=contacts_6,
        )

    def _store(self, source: Contact, request: Store, *, now_s: float, at_s: float) -> Stored:
        """Keep an announcement, if it comes from where it says and is sound."""
        if not self._tokens.check(request.token, source.host, at_s=at_s):
            return Stored(is_kept=False, reason="the token is not from here, or old")
        if not self._stores.admit(source_group(source.host), now_s=at_s):
            return Stored(is_kept=False, reason="too many announcements from this address")
        try:
            self._storage.store(request.key, request.entry, source_host=source.host, now_s=now_s)
            later = self._storage.later(request.key, request.entry, now_s=now_s)
        except InvalidAnnouncementError as error:
            total = self._storage.count(request.key, now_s=now_s)
            return Stored(is_kept=False, reason=error.message[:200], total=total)
        return Stored(is_kept=True, later=later, total=self._storage.count(request.key, now_s=now_s))
