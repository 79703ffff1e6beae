"""Where clients sign for what they got, and show what they gave."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Final

from petals_core.errors import InvalidRequestError, OverloadedError
from petals_core.identity import Identity, PeerId
from petals_core.net.stream import Stream
from petals_core.receipts import Receipt, read_endorsement
from petals_core.wire.messages import Contribution, ContributionNoted
from petals_dht.rates import Rate, RateLimiter
from petals_server.comfort.ledger import ServedLedger
from petals_server.contribution.book import ReceiptBook
from petals_server.contribution.weights import count_given, weigh, weighted_median
from petals_server.placement.observation import Votes

_MAX_PEERS: Final = 4096
_MAX_VOTES: Final = 256
_MAX_VOTERS: Final = 16
_VOTE_S: Final = 1800.0
_MAX_VOTE_WEIGHT: Final = 1_000_000
_CHECKS: Final = Rate(per_s=400.0, burst=2000.0)
"""Signatures of clients that are verified; each takes the event loop about 0.1 ms."""
_CHECKS_OF_ONE: Final = Rate(per_s=10.0, burst=300.0)
_CHECKS_AT_ONCE: Final = 16
_TOLERANCE: Final = 1.01


class ContributionDesk:
    """Answers ``Contribution`` messages, and knows the weight of each peer."""

    def __init__(self, identity: Identity, ledger: ServedLedger, book: ReceiptBook, *, prefers: bool) -> None:
        """``prefers``: whether contributors get a higher share."""
        self._identity = identity
        self._ledger = ledger
        self._book = book
        self._prefers = prefers
        self._signed: Counter[PeerId] = Counter()
        """What each client has signed for since the start."""
        self._given: OrderedDict[PeerId, int] = OrderedDict()
        self._votes: OrderedDict[bytes, OrderedDict[PeerId, tuple[float, float]]] = OrderedDict()
        """For each beginning of a server's id what clients observed of it, and when they said so."""
        self._checks = RateLimiter(_CHECKS, max_sources=1)
        self._checks_of = RateLimiter(_CHECKS_OF_ONE)

    def weight(self, peer_id: Hashable) -> float:
        """The weight of a peer in the fair shares: 1 where nothing is known or preferred."""
        if not self._prefers or not isinstance(peer_id, PeerId):
            return 1.0
        return weigh(self._given.get(peer_id, 0), self._ledger.block_tokens_of(peer_id))

    async def serve(self, stream: Stream, request: Contribution) -> None:
        """Check what a client says, countersign its receipt, and tell its weight.

        Raises:
            InvalidRequestError: a receipt or the endorsement is forged, or of somebody else.
            OverloadedError: there are more signatures to verify than this server takes time for.
        """
        client, now_s = stream.peer_id, time.time()
        if client is None:
            raise InvalidRequestError("only a peer with an identity can sign receipts")
        self._admit(client, 1 + 2 * len(request.given))
        if request.endorsement is not None:
            await self._note_given(client, request, now_s)
        signed = None if request.receipt is None else self._countersign(client, request.receipt, now_s)
        for beginning, percent in request.observed:
            self._note_vote(beginning, client, percent / 100, now_s)
        await stream.send(ContributionNoted(receipt=signed, weight=self.weight(client)), end=True)

    def _admit(self, client: PeerId, num_checks: int) -> None:
        monotonic_s = time.monotonic()
        for limiter, source in ((self._checks_of, str(client)), (self._checks, "")):
            if not limiter.admit(source, now_s=monotonic_s, cost=num_checks):
                raise OverloadedError("too many receipts to verify at once", retry_after_s=60.0)

    def _countersign(self, client: PeerId, encoded: bytes, now_s: float) -> bytes:
        receipt = Receipt.decode(encoded, now_s=now_s)
        if receipt.client_id != client:
            raise InvalidRequestError("the receipt was signed by another client")
        amount = receipt.statement.block_tokens
        if self._signed[client] + amount > _TOLERANCE * self._ledger.block_tokens_of(client):
            raise InvalidRequestError("the receipt is for more than this server has computed for you")
        whole = receipt.countersign(self._identity)
        self._signed[client] += amount
        if len(self._signed) > _MAX_PEERS:
            del self._signed[next(iter(self._signed))]
        self._book.add(whole)
        return whole.encoded

    async def _note_given(self, client: PeerId, request: Contribution, now_s: float) -> None:
        assert request.endorsement is not None
        server = read_endorsement(request.endorsement, client)
        receipts = []
        for number, encoded in enumerate(request.given, 1):
            receipts.append(Receipt.decode(encoded, now_s=now_s))
            if number % _CHECKS_AT_ONCE == 0:
                await asyncio.sleep(0)  # others wait for the event loop
        if any(receipt.server_id != server for receipt in receipts):
            raise InvalidRequestError("a receipt is of another server than the one that endorses you")
        known = {receipt.client_id for receipt in receipts if self._ledger.block_tokens_of(receipt.client_id) > 0} - {
            client
        }
        self._given[client] = count_given(receipts, known)
        self._given.move_to_end(client)
        if len(self._given) > _MAX_PEERS:
            self._given.popitem(last=False)

    # --- observations -------------------------------------------------------------------------------------------------

    def _note_vote(self, beginning: bytes, client: PeerId, share: float, now_s: float) -> None:
        if not self._ledger.block_tokens_of(client):
            return  # anybody can invent clients: only those that this server has worked for have a vote
        votes = self._votes.setdefault(beginning, OrderedDict())
        self._votes.move_to_end(beginning)
        votes[client] = (share, now_s)
        votes.move_to_end(client)
        if len(votes) > _MAX_VOTERS:
            votes.popitem(last=False)
        if len(self._votes) > _MAX_VOTES:
            self._votes.popitem(last=False)

    def observed(self) -> list[tuple[bytes, float]]:
        """What clients saw of other servers in the last half hour, by the beginnings of their ids; the worst first.

        It is the median, in which a client counts by what this server has computed for it, up to a limit: so invented
        clients decide nothing unless they use this server more than honest ones do.
        """
        oldest_s = time.time() - _VOTE_S
        medians = []
        for beginning, votes in self._votes.items():
            weighted = [
                (share, min(_MAX_VOTE_WEIGHT, self._ledger.block_tokens_of(client)))
                for client, (share, at_s) in votes.items()
                if at_s >= oldest_s
            ]
            if weighted:
                medians.append((weighted_median(weighted), beginning))
        return [(beginning, share) for share, beginning in sorted(medians)]

    @property
    def votes(self) -> Votes:
        """The same, as one observer's votes."""
        return dict(self.observed())
