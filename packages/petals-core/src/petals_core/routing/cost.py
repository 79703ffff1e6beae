"""What visiting a server costs, from what it announces, what was measured, and how it behaved.

``docs/routing.md`` says where each constant comes from.
"""

from __future__ import annotations

from typing import Final

from petals_core.announcement import Announcement
from petals_core.identity import PeerId
from petals_core.routing.graph import Server

SOFTWARE_S: Final = 0.001
"""Cost of a hop beside network and blocks: framing, TLS, wake-ups, a turn of the server's loop."""
UNKNOWN_DELAY_S: Final = 0.05
"""One-way delay assumed for servers that were not measured: dearer than most, so that measured ones are preferred."""
UNKNOWN_TOKENS_PER_S: Final = 100.0
"""Assumed rate of one span, for servers that announce none."""
SESSION_SHARE: Final = 0.2
"""What each session that a server has open adds to a step, as a share of an idle server's step."""
NOISE_SHARE: Final = 0.1
NOISE_S: Final = 0.001
"""Costs that differ by less than this share, and this time, are equal: chance decides between them."""
FULL_CACHE_S: Final = 5.0
"""Cost of a server whose cache has no room for the session: it may have when others have ended."""
_MAX_LOAD: Final = 100.0
_MIN_RATE: Final = 0.01


def estimate_cost(
    announcement: Announcement,
    peer_id: PeerId,
    *,
    round_trip_s: float | None,
    penalty_s: float,
    num_sessions: int | None = None,
    cache_tokens_left: int | None = None,
    cache_tokens: int = 0,
    batch_tokens: int | None = None,
    noise: float = 0.0,
) -> Server:
    """Weigh a server for the planner.

    What a server claims only moves it within bounds: a liar is found out by measuring and by failures.

    Args:
        round_trip_s: from the client; None: not measured.
        penalty_s: what its failures add.
        num_sessions: open there, as it said when it was last asked; None: it was not asked.
        cache_tokens_left: the same of its attention cache; None: what it announced counts.
        cache_tokens: what a session will need of its attention cache.
        batch_tokens: tokens of a micro-batch that passes through without a session; None: single tokens of a session.
        noise: from 0 to 1, drawn anew by every client for every server, so that equals share the load.
    """
    # A plan weighs every server of the swarm: calls of min() and max(), and named fields, would take as long again.
    rate = announcement.inference_tokens_per_s if batch_tokens is None else announcement.forward_tokens_per_s
    rate = rate or UNKNOWN_TOKENS_PER_S
    if rate < _MIN_RATE:
        rate = _MIN_RATE
    load = announcement.load or 0.0
    if num_sessions and load < SESSION_SHARE * num_sessions:
        load = SESSION_SHARE * num_sessions
    if load > _MAX_LOAD:
        load = _MAX_LOAD
    start, end = announcement.start, announcement.end
    span_s = (batch_tokens or 1) * (1.0 + load) / rate
    client_s = UNKNOWN_DELAY_S if round_trip_s is None else round_trip_s / 2
    hop_s = SOFTWARE_S + penalty_s + noise * (NOISE_S + NOISE_SHARE * (client_s + span_s))
    left = announcement.cache_tokens_left if cache_tokens_left is None else cache_tokens_left
    if left is not None and left < cache_tokens:
        hop_s += FULL_CACHE_S
    return Server(peer_id, start, end, client_s, hop_s, span_s / (end - start), announcement.next_delays)
