"""A swarm as one of its servers sees it, made of announcements."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from petals_core.announcement import Announcement
from petals_server.placement.coverage import Coverage, Placed
from petals_server.placement.intents import Intent
from petals_server.placement.observation import Votes, collect_votes, trust

_UNKNOWN_TOKENS_PER_S = 1.0
"""Of a server that announces no speed, where no other does either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The other servers of a model."""

    num_blocks: int
    servers: tuple[Placed, ...]
    """All that count; those on the way are where they go."""
    intents: tuple[Intent, ...]
    """Of servers that are about to move, or on the way."""
    joining: tuple[Intent, ...]
    """Of servers that start and do not hold anything yet."""
    typical_tokens_per_s: float
    """The median of what servers announce."""

    @property
    def coverage(self) -> Coverage:
        """What they hold."""
        return Coverage(self.num_blocks, self.servers)

    @property
    def settled(self) -> Coverage:
        """What they hold without those that start."""
        joining = {intent.peer_id for intent in self.joining}
        return Coverage(self.num_blocks, (server for server in self.servers if server.peer_id not in joining))

    @property
    def steady(self) -> list[Placed]:
        """Those that may be relied on."""
        return [server for server in self.servers if server.is_steady]


def look(
    announcements: Mapping[bytes, Announcement],
    *,
    num_blocks: int,
    silent: Collection[bytes] = (),
    staying: Collection[bytes] = (),
    own_votes: Votes | None = None,
) -> View:
    """Weigh the announcements of all other servers, by peer id digest.

    Args:
        silent: servers that were asked and did not answer: they do not count.
        staying: servers that may be relied on although they have an intent.
        own_votes: what this server observed itself.
    """
    votes = collect_votes(announcements, own_votes or {})
    rates = [
        entry.inference_tokens_per_s
        for peer_id, entry in announcements.items()
        if entry.inference_tokens_per_s and peer_id not in silent
    ]
    typical = statistics.median(rates) if rates else _UNKNOWN_TOKENS_PER_S
    servers: list[Placed] = []
    intents: list[Intent] = []
    joining: list[Intent] = []
    for peer_id, entry in announcements.items():
        if entry.num_blocks != num_blocks or entry.state == "offline" or peer_id in silent:
            continue
        start, end, is_steady = entry.start, entry.end, entry.state == "online"
        if entry.intent is not None and entry.intent_at_s is not None:
            to_start, to_end = entry.intent
            intent = Intent(
                peer_id=peer_id,
                start=to_start,
                end=to_end,
                issued_at_s=entry.intent_at_s,
                source=(start, end) if entry.state == "online" else (0, 0),
                has_left=entry.state == "draining",
            )
            is_steady = is_steady and peer_id in staying
            if entry.state == "joining":
                joining.append(intent)
            else:
                intents.append(intent)
            if entry.state == "draining":
                start, end = to_start, to_end
        elif entry.state == "draining":
            continue
        rate = (entry.inference_tokens_per_s or typical) * trust(votes.get(peer_id, ()))
        servers.append(Placed(peer_id=peer_id, start=start, end=end, tokens_per_s=max(rate, 1e-6), is_steady=is_steady))
    return View(
        num_blocks=num_blocks,
        servers=tuple(servers),
        intents=tuple(intents),
        joining=tuple(joining),
        typical_tokens_per_s=typical,
    )


def only_holders(servers: Iterable[Placed], blocks: Iterable[int]) -> set[bytes]:
    """The servers on which any of ``blocks`` hangs alone or nearly so: those are to be asked whether they live."""
    found: set[bytes] = set()
    servers = [server for server in servers if server.is_steady]
    for block in blocks:
        holders = [server.peer_id for server in servers if server.start <= block < server.end]
        found.update(holders[:4])
    return found
