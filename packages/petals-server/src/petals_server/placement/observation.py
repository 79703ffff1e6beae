"""What a server's announced speed is worth, by what others saw of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

MIN_TRUST: Final = 0.05
_PRIOR_VOTES: Final = 2


def trust(observed: Sequence[float]) -> float:
    """By what an announced speed is multiplied, 0.05 to 1: the median of what observers saw over what was announced.

    Each observer has one vote. Two votes for what was announced are added, so that one or two observers alone condemn
    nobody; and nothing makes a server faster than it says, so that friends of a liar gain nothing. While less than half
    of the observers (plus two) lie, the result lies between what honest ones saw.
    """
    votes = [min(1.0, max(0.0, vote)) for vote in observed] + [1.0] * _PRIOR_VOTES
    return max(MIN_TRUST, statistics.median(votes))
