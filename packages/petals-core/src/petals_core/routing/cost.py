"""What visiting a server costs, from what it announces, what was measured, and how it behaved."""

from __future__ import annotations

import math

from petals_core.announcement import Announcement
from petals_core.identity import PeerId
from petals_core.routing.graph import Server

SOFTWARE_S = 0.002
"""Cost of a hop beside the network: framing, wake-ups, a turn of the server's loop."""
UNKNOWN_ROUND_TRIP_S = 0.1
"""Assumed for servers that were not measured: dearer than most, so that measured ones are preferred."""
UNKNOWN_TOKENS_PER_S = 100.0
"""Assumed rate of one span, for servers that announce none."""
_FULL_CACHE_S = 5.0
_MAX_LOAD = 100.0


def estimate_cost(
    announcement: Announcement,
    peer_id: PeerId,
    *,
    round_trip_s: float | None,
    penalty_s: float,
    cache_tokens: int = 0,
) -> Server:
    """Weigh a server for the planner. ``cache_tokens`` is what a session will need of its attention cache.

    What a server claims only moves it within bounds: a liar is found out by measuring and by failures.
    """
    rate = announcement.inference_tokens_per_s or UNKNOWN_TOKENS_PER_S
    load = min(announcement.load or 0.0, _MAX_LOAD)
    num_blocks = announcement.end - announcement.start
    hop_s = SOFTWARE_S + _rounded(UNKNOWN_ROUND_TRIP_S if round_trip_s is None else round_trip_s) + penalty_s
    if announcement.cache_tokens_left is not None and announcement.cache_tokens_left < cache_tokens:
        hop_s += _FULL_CACHE_S
    return Server(
        peer_id=peer_id,
        start=announcement.start,
        end=announcement.end,
        hop_s=hop_s,
        block_s=_rounded((1.0 + load) / (max(rate, 0.01) * num_blocks)),
    )


def _rounded(duration_s: float) -> float:
    """Round to the next of ten steps per decade: what differs by less is equal, and equals share the load."""
    if duration_s <= 0.0:
        return 0.0
    return 10.0 ** (math.ceil(math.log10(duration_s) * 10) / 10)
