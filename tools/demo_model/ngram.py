"""The yardstick: an n-gram model with interpolated modified Kneser-Ney smoothing.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3: three discounts
per order, by count; all orders below the highest count after how many different tokens an n-gram was seen instead of
how often; the lowest order is interpolated with the uniform distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]

ORDER = 5
TOKEN_BITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The n-grams of one length: sorted keys with their discounted counts, sorted contexts with their totals.

    ``left`` holds what the discounts freed in each context: the weight of the next shorter n-grams, before division.
    """

    keys: Tokens
    discounted: Numbers
    contexts: Tokens
    totals: Numbers
    left: Numbers


def packed(windows: Tokens) -> Tokens:
    """Return one integer per row of tokens; rows are at most five tokens of twelve bits each."""
    keys = np.zeros(len(windows), dtype=np.int64)
    for column in windows.T:
        keys = keys << TOKEN_BITS | column
    return keys


def discounts(counts: Tokens) -> Numbers:
    """Return how much to take off a count of 0, 1, 2, and 3 or more: equation 26 of the paper."""
    first, second, third, fourth = (max(1.0, float((counts == count).sum())) for count in (1, 2, 3, 4))
    y = first / (first + 2 * second)
    found = [0.0, 1 - 2 * y * second / first, 2 - 3 * y * third / second, 3 - 4 * y * fourth / third]
    return np.array([min(max(value, 0.0), count) for count, value in enumerate(found)])


def make_order(keys: Tokens, counts: Tokens) -> Order:
    """Return an order from its distinct sorted n-grams and their counts."""
    taken = discounts(counts)[np.minimum(counts, 3)]
    contexts, places = np.unique(keys >> TOKEN_BITS, return_inverse=True)
    return Order(
        keys=keys,
        discounted=counts - taken,
        contexts=contexts,
        totals=np.bincount(places, weights=counts).astype(np.float64),
        left=np.bincount(places, weights=taken).astype(np.float64),
    )


def looked_up(sorted_keys: Tokens, values: Numbers, keys: Tokens) -> Numbers:
    """Return the values that belong to keys, 0 for a key that isn't there."""
    places = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[places] == keys, values[places], 0.0)


class KneserNey:
    """Probabilities of the next token after up to ``order - 1`` tokens; every document begins with a begin token."""

    def __init__(self, documents: Sequence[Tokens], *, num_tokens: int, order: int = ORDER) -> None:
        """Count the documents' n-grams.

        Raises:
            ValueError: a token or an n-gram doesn't fit into 64 bits.
        """
        if num_tokens > 2**TOKEN_BITS or order > 63 // TOKEN_BITS or order < 2:
            raise ValueError(f"an order of 2 to {63 // TOKEN_BITS} and at most {2**TOKEN_BITS} tokens are possible")
        self.num_tokens = num_tokens
        self.order = order
        self._orders = [self._counted(documents, length) for length in range(1, order + 1)]

    def _counted(self, documents: Sequence[Tokens], length: int) -> Order:
        """Count n-grams: how often at full length and where they start a document, else after how many tokens."""
        full = _distinct(documents, length)
        if length == self.order:
            return make_order(*full)
        longer, _ = _distinct(documents, length + 1)
        mask = (1 << TOKEN_BITS * length) - 1
        keys, counts = np.unique(longer & mask, return_counts=True)
        # N-grams at the very start of a document have nothing to their left: they keep their own counts.
        first_keys, first_counts = _distinct([document[:length] for document in documents], length)
        if length == 1:
            return make_order(keys, counts)
        all_keys, places = np.unique(np.concatenate([keys, first_keys]), return_inverse=True)
        weights = np.concatenate([counts, first_counts]).astype(np.float64)
        return make_order(all_keys, np.bincount(places, weights=weights).astype(np.int64))

    def probabilities(self, contexts: Tokens, nexts: Tokens) -> Numbers:
        """Return the probability of each next token after its row of context, [N, <order] and [N] to [N]."""
        found = np.full(len(nexts), 1.0 / self.num_tokens)
        for length in range(1, min(contexts.shape[1] + 1, self.order) + 1):
            order = self._orders[length - 1]
            before = packed(contexts[:, contexts.shape[1] - length + 1 :])
            totals = looked_up(order.contexts, order.totals, before)
            counts = looked_up(order.keys, order.discounted, before << TOKEN_BITS | nexts)
            left = looked_up(order.contexts, order.left, before)
            safe = np.where(totals > 0, totals, 1.0)
            found = np.where(totals > 0, (counts + left * found) / safe, found)
        return found

    def bits(self, document: Tokens) -> float:
        """Return what the document costs in bits after its first token, which every document has alike."""
        bits = 0.0
        for length in range(1, self.order):
            stop = len(document) if length == self.order - 1 else min(length + 1, len(document))
            if stop > length:
                windows = np.lib.stride_tricks.sliding_window_view(document[:stop], length + 1)
                bits -= float(np.log2(self.probabilities(windows[:, :-1], windows[:, -1])).sum())
        return bits


def _distinct(documents: Sequence[Tokens], length: int) -> tuple[Tokens, Tokens]:
    """Return the distinct n-grams of a length inside documents, sorted, and how often each occurs."""
    views = [
        np.lib.stride_tricks.sliding_window_view(document, length) for document in documents if len(document) >= length
    ]
    keys, counts = np.unique(packed(np.concatenate(views)), return_counts=True)
    return keys, counts.astype(np.int64)
