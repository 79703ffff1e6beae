"""From receipts to a share of the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from petals_core.identity import PeerId
from petals_core.receipts import Receipt

MAX_WEIGHT: Final = 4.0
"""Of a peer that has given very much more than it has taken; everybody else has 1 at least."""
MAX_PER_CLIENT: Final = 50_000_000
"""Tokens times blocks of one client that count, so that two friends can't make a fortune."""
_FREE: Final = 1_000_000
"""Tokens times blocks that are as good as nothing: about a chat of 12,000 tokens through 80 blocks."""


def count_given(receipts: Iterable[Receipt], known_clients: Collection[PeerId]) -> int:
    """Tokens times blocks that a server computed for others, of its receipts.

    Anybody can make clients that sign what they like. So each client counts up to a limit, and all that this server has
    never met count together as one.
    """
    per_client: Counter[PeerId | None] = Counter()
    seen: set[bytes] = set()
    for receipt in receipts:
        if receipt.server_signature is None or receipt.statement.nonce in seen:
            continue
        seen.add(receipt.statement.nonce)
        client = receipt.client_id if receipt.client_id in known_clients else None
        per_client[client] += receipt.statement.block_tokens
    return sum(min(amount, MAX_PER_CLIENT) for amount in per_client.values())


def weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """The smallest value of ``(value, weight)`` up to which half of all weight lies."""
    total = sum(weight for _, weight in values)
    reached = 0.0
    for value, weight in sorted(values):
        reached += weight
        if 2 * reached >= total:
            return value
    raise ValueError("no values")


def weigh(given: int, taken: int) -> float:
    """The weight of a peer in the fair shares of a server, 1 to ``MAX_WEIGHT``.

    ``given`` is what it computed for others, ``taken`` what this server computed for it, both in tokens times blocks.
    Who gives as much as it takes gets two and a half times the share of somebody who gives nothing; and nobody waits
    on a device that all others leave idle.
    """
    return 1.0 + (MAX_WEIGHT - 1.0) * given / (given + taken + _FREE)
