"""What others see of servers' speed, as a part of what these announce."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

from petals_core.announcement import OBSERVED_ID_BYTES
from petals_core.identity import PeerId

WINDOW: Final = 16
"""Requests of a server that are remembered; the best of them counts, since any server is busy now and then."""
MIN_REQUESTS: Final = 8
"""Before so many nothing is said of a server."""
SLACK_S: Final = 0.005
"""Of a request's time is nobody's fault: software, and clocks that count milliseconds."""
MAX_EXCUSE: Final = 2.0
"""A server with many sessions may take that many times as long; it says itself how many it has."""
_MAX_SERVERS: Final = 64


class Observations:
    """The best that each server did lately; the servers seen longest ago are forgotten first."""

    def __init__(self) -> None:
        self._shares: OrderedDict[PeerId, deque[float]] = OrderedDict()

    def note(self, peer_id: PeerId, *, expected_s: float, took_s: float) -> None:
        """Note a request that should have taken ``expected_s`` by what the server announces."""
        shares = self._shares.get(peer_id)
        if shares is None:
            shares = self._shares[peer_id] = deque(maxlen=WINDOW)
            if len(self._shares) > _MAX_SERVERS:
                self._shares.popitem(last=False)
        else:
            self._shares.move_to_end(peer_id)
        shares.append(min(1.0, (expected_s + SLACK_S) / (took_s + 1e-9)))

    def percents(self) -> tuple[tuple[bytes, int], ...]:
        """For servers with enough requests: the beginning of the id, and percent of what is announced."""
        return tuple(
            (peer_id.digest[:OBSERVED_ID_BYTES], round(100 * max(shares)))
            for peer_id, shares in self._shares.items()
            if len(shares) >= MIN_REQUESTS
        )


def unexplained_s(*, network_s: float, round_trips_s: float) -> float:
    """What of a trip nobody admits to: each server of the chain is held to account for it.

    Servers say themselves how long they computed, so one that is slower than it announces may say too little; then the
    rest looks like time on the way. The way around a chain takes at most the sum of the round trips to its servers (the
    triangle inequality), which the client has measured itself. Honest servers stand in many chains, and the best of
    their requests counts.

    Args:
        network_s: what the trip took beside all that servers say of queues and computing.
        round_trips_s: the sum of the client's round trips to the servers of the chain.
    """
    return max(0.0, network_s - round_trips_s - SLACK_S)
