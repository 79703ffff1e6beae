"""How many blocks a server may hold, and how fast it would be with each number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from petals_server.placement.coverage import Offer

MIN_LENGTH_SHARE: Final = 0.7
"""Of what memory holds: shorter spans make more hops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """What a server can do, as it measured itself."""

    max_blocks: int
    """As many as its memory holds, and no more than the model has."""
    block_tokens_per_s: float
    """Tokens times blocks that it computes in a second."""
    link_tokens_per_s: float | None = None
    """Tokens that its line carries; None: more than it computes."""
    min_blocks: int | None = None
    """The least that it should hold; None: ``MIN_LENGTH_SHARE`` of the most."""

    def offer(self, num_blocks: int) -> Offer:
        """So many blocks: each token takes the time of all of them, and the line once."""
        computed = self.block_tokens_per_s / num_blocks
        rate = computed if self.link_tokens_per_s is None else min(computed, self.link_tokens_per_s)
        return Offer(num_blocks=num_blocks, tokens_per_s=rate)

    @property
    def lengths(self) -> range:
        """From the most to the least."""
        least = round(self.max_blocks * MIN_LENGTH_SHARE) if self.min_blocks is None else self.min_blocks
        return range(self.max_blocks, max(1, min(least, self.max_blocks)) - 1, -1)

    @property
    def offers(self) -> tuple[Offer, ...]:
        """All that the server could hold, the most first.

        Spans all as long as memory allows would leave gaps: three of 26 blocks are two short of eighty. A server
        that is limited by its computing gives nothing away by a shorter span, since its tokens come through faster.
        """
        return tuple(self.offer(length) for length in self.lengths)

    def some_offers(self, present: int, chances: tuple[float, ...]) -> tuple[Offer, ...]:
        """The most, the ``present`` length, and one more for each of ``chances`` (uniform in 0 to 1)."""
        lengths = self.lengths
        chosen = {self.max_blocks, present, *(lengths[int(chance * len(lengths))] for chance in chances)}
        return tuple(self.offer(length) for length in sorted(chosen, reverse=True))
