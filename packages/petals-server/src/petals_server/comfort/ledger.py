"""What a server computed, in all and for whom."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from petals_core.identity import PeerId

_MAX_PEERS: Final = 4096


class ServedLedger:
    """Counts since the start of the server. The peers that were served longest ago are forgotten first."""

    def __init__(self) -> None:
        self.num_requests = 0
        """Sessions and requests without one."""
        self.num_tokens = 0
        """Through the span, or a part of it."""
        self.block_tokens = 0
        """Tokens times blocks."""
        self._by_peer: OrderedDict[PeerId, int] = OrderedDict()

    def begin(self) -> None:
        """Note a new session or request."""
        self.num_requests += 1

    def note(self, peer_id: PeerId, *, num_tokens: int, num_blocks: int) -> None:
        """Note tokens that were computed for a peer."""
        self.num_tokens += num_tokens
        self.block_tokens += num_tokens * num_blocks
        self._by_peer[peer_id] = self._by_peer.pop(peer_id, 0) + num_tokens * num_blocks
        if len(self._by_peer) > _MAX_PEERS:
            self._by_peer.popitem(last=False)

    def block_tokens_of(self, peer_id: PeerId) -> int:
        """Tokens times blocks that were computed for a peer."""
        return self._by_peer.get(peer_id, 0)

    @property
    def num_peers(self) -> int:
        """Different peers, as far as they are remembered."""
        return len(self._by_peer)
