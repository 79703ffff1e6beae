"""Searching for the nodes that are nearest to a key, among nodes that may be slow or dead."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Final

from petals_dht.contacts import Contact, may_be_told, unpack_contacts
from petals_dht.crawl import Crawl
from petals_dht.messages import FindNode, Found, Nodes
from petals_dht.protocol import Answer, DirectoryProtocol

MIN_PATIENCE_S: Final = 0.15
"""So long a node may take at least before a search goes on without it for good."""
_MIN_STALL_S: Final = 0.03
"""So long at least before others are asked beside it, which costs a datagram and loses nothing."""
_TIMES_AS_LONG: Final = 4
"""As long as others took, for both."""
_GRACE_S: Final = 0.02

Ask = Callable[[Contact], Awaitable[list[Contact] | None]]
"""Asks a node; returns the contacts that it tells, None if it does not answer."""
Place = tuple[Contact, bytes]
"""A node, and the token that it gave."""


class Search:
    """Searches of one node. ``width`` is Kademlia's k."""

    def __init__(self, protocol: DirectoryProtocol, *, width: int, patience_s: float) -> None:
        """``patience_s``: how long ``nearest_nodes`` waits for a node at least, by default."""
        self._protocol = protocol
        self._width = width
        self._patience_s = patience_s

    async def nearest_nodes(
        self,
        key: bytes,
        *,
        min_patience_s: float | None = None,
        on_lull: Callable[[list[Place]], None] | None = None,
    ) -> list[Place]:
        """The nodes nearest to ``key`` that answer, each with its token, the nearest first.

        ``on_lull`` is given what was found so far when only such are waited for that take long, or are dead.
        """
        tokens: dict[Contact, bytes] = {}

        def found(crawl: Crawl) -> list[Place]:
            return [(contact, tokens[contact]) for contact in crawl.nearest()]

        async def ask(contact: Contact) -> list[Contact] | None:
            answer = await self._protocol.call_contact(contact, FindNode(key=key))
            if answer is None or not isinstance(answer.response, Nodes):
                return None
            tokens[contact] = answer.response.token
            return self.told(answer, answer.response)

        crawl = await self.crawl(
            key,
            ask,
            min_patience_s=min_patience_s or self._patience_s,
            on_lull=None if on_lull is None else lambda crawl: on_lull(found(crawl)),
        )
        return found(crawl)

    async def crawl(
        self,
        key: bytes,
        ask: Ask,
        *,
        min_patience_s: float = MIN_PATIENCE_S,
        on_lull: Callable[[Crawl], None] | None = None,
    ) -> Crawl:
        """Search for the nodes nearest to ``key``.

        A node that takes several times as long as others did gives up its place: others are asked beside it. Once
        somebody has answered, and it has had at least ``min_patience_s``, its answer is left out.
        """
        loop = asyncio.get_running_loop()
        seeds = self._protocol.router.nearest(key, self._width)
        crawl = Crawl(key, seeds, own_id=self._protocol.own.id, width=self._width)
        under_way: dict[asyncio.Task[list[Contact] | None], tuple[Contact, float]] = {}
        stalled: set[Contact] = set()
        slowest_s: float | None = None
        try:
            while not crawl.is_done:
                for contact in crawl.take():
                    under_way[asyncio.ensure_future(ask(contact))] = (contact, loop.time())
                if on_lull is not None and all(contact in stalled for contact, _ in under_way.values()):
                    on_lull(crawl)
                usual_s = self._protocol.recent_rtt_s if slowest_s is None else slowest_s
                stall_s = max(_MIN_STALL_S, _TIMES_AS_LONG * usual_s)
                patience_s = math.inf if slowest_s is None else max(min_patience_s, _TIMES_AS_LONG * slowest_s)
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
                        self._protocol.spawn(_ignore(task))
                    elif waited_s >= stall_s and contact not in stalled:
                        stalled.add(contact)
                        crawl.stalled(contact)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
        return crawl

    def told(self, answer: Answer, response: Nodes | Found) -> list[Contact]:
        """The contacts in a response that may be asked."""
        contacts = unpack_contacts(response.contacts_4, response.contacts_6)
        return [
            contact
            for contact in contacts
            if may_be_told(contact, by=answer.contact.host)
            and (6 if ":" in contact.host else 4) in self._protocol.families
        ]


async def _ignore(task: asyncio.Task[list[Contact] | None]) -> None:
    """Wait for an answer that comes too late, so that a dead node leaves the routing table."""
    await task
