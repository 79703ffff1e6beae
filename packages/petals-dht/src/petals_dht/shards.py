"""Where the announcements of a model with thousands of servers are kept: under several keys, by peer ids.

A model's own key is enough for some hundred servers. A server that finds it crowded announces itself under a second key
as well, that of all servers whose peer id begins with the same hexadecimal digit, and so on. A reader that finds a key
crowded reads the sixteen keys below it. It takes that at a higher count, so what it reads there is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from petals_core.announcement import SignedAnnouncement
from petals_core.identity import PeerId
from petals_dht.contacts import model_key

MAX_DEPTH: Final = 3
"""Digits of a key's prefix, so room for 16 ** 3 times the announcements of one key."""
DIGITS: Final = "0123456789abcdef"
ENOUGH_SERVERS: Final = 1024
"""Of a larger model, for those who choose a chain."""
_CROWDED: Final = 512
_SPARSE: Final = 256
MAX_WHOLE: Final = 767
"""A key with more than so many announcements is read by way of the keys below it."""
_HOLDERS: Final = 4
"""Servers of each block that a part of a model's servers must have to be enough."""


def is_crowded(total: int) -> bool:
    """Whether who announces itself under a key with so many announcements has to use the key below it, too."""
    return total >= _CROWDED


def is_sparse(total: int) -> bool:
    """Whether the keys below are not needed any more."""
    return total < _SPARSE


def is_split(total: int) -> bool:
    """Whether who reads a key with so many announcements has to read the keys below it."""
    return total > MAX_WHOLE


def key_of(fingerprint: str, peer_id: PeerId, depth: int) -> bytes:
    """The key under which a server announces itself: the model's own at depth 0, and those below it."""
    return model_key(fingerprint, peer_id.digest.hex()[:depth])


def keys_of(fingerprint: str, peer_id: PeerId) -> tuple[bytes, ...]:
    """All keys under which a server's announcement may be kept."""
    return tuple(key_of(fingerprint, peer_id, depth) for depth in range(MAX_DEPTH + 1))


def is_enough(servers: Iterable[SignedAnnouncement], wanted: int) -> bool:
    """Whether a part of a model's servers will do: so many, and at least four that hold each block."""
    num_servers, num_blocks = 0, 0
    steps: Counter[int] = Counter()
    for signed in servers:
        announcement = signed.announcement
        num_servers += 1
        num_blocks = max(num_blocks, announcement.num_blocks)
        if announcement.state == "online":
            steps[announcement.start] += 1
            steps[announcement.end] -= 1
    held, fewest = 0, num_servers
    for block in range(num_blocks):
        held += steps[block]
        fewest = min(fewest, held)
    return num_servers >= wanted and fewest >= _HOLDERS
