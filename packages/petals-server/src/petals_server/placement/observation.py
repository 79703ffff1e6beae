"""What a server's announced speed is worth, by what others saw of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from petals_core.announcement import OBSERVED_ID_BYTES, Announcement

MIN_TRUST: Final = 0.05
_PRIOR_VOTES: Final = 2
_MAX_VOTES: Final = 64

Votes: TypeAlias = Mapping[bytes, float]
"""What somebody saw of servers: beginning of a peer id's digest to what was reached over what was announced."""


def trust(observed: Sequence[float]) -> float:
    """By what an announced speed is multiplied, 0.05 to 1: the median of what observers saw over what was announced.

    Each observer has one vote. Two votes for what was announced are added, so that one or two observers alone condemn
    nobody; and nothing makes a server faster than it says, so that friends of a liar gain nothing. While less than half
    of the votes are lies, the result lies between honest ones.
    """
    votes = [min(1.0, max(0.0, vote)) for vote in observed] + [1.0] * _PRIOR_VOTES
    return max(MIN_TRUST, statistics.median(votes))


def collect_votes(announcements: Mapping[bytes, Announcement], own: Votes) -> dict[bytes, list[float]]:
    """What all observed of each server: one vote for each announcement that names it, and this server's own.

    Announcements name servers by the beginnings of their ids. What a server says of itself does not count.
    """
    by_beginning = {peer_id[:OBSERVED_ID_BYTES]: peer_id for peer_id in announcements}
    votes: dict[bytes, list[float]] = {}
    for beginning, share in own.items():
        if beginning in by_beginning:
            votes[by_beginning[beginning]] = [share]
    for observer, announcement in announcements.items():
        for beginning, percent in announcement.observed:
            observed = by_beginning.get(beginning)
            if observed is not None and observed != observer:
                heard = votes.setdefault(observed, [])
                if len(heard) < _MAX_VOTES:
                    heard.append(percent / 100)
    return votes


def lower_votes(seen_by_clients: Votes, timed: Votes) -> list[tuple[bytes, float]]:
    """What one server says of others, the worst first: the lower of what its clients saw and what it timed itself.

    So who hurries when another server looks gains nothing, and neither does who invents clients that praise it.
    """
    lower = dict(seen_by_clients)
    for beginning, share in timed.items():
        lower[beginning] = min(share, lower.get(beginning, share))
    return sorted(lower.items(), key=lambda vote: (vote[1], vote[0]))
