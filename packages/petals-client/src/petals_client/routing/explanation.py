"""Why a chain is what it is: the cost of each edge, and why others lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from petals_core.identity import PeerId
from petals_core.routing.cost import FULL_CACHE_S, NOISE_S, NOISE_SHARE, SOFTWARE_S
from petals_core.routing.graph import Chain, Hop, Server
from petals_core.routing.planner import Lattice, cost_of

_MUCH: Final = 1.2
"""How many times as slow or as far a server is whose speed or distance is given as the reason."""


EDGE_COLUMNS: Final = ("to", "blocks", "delay ms", "which is", "software", "compute", "penalty", "chance", "sum ms")
ALTERNATIVE_COLUMNS: Final = ("server", "blocks", "ms more", "why not")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a server besides its cost."""

    public_name: str
    is_measured: bool
    """Whether the client has measured the delay to it."""
    penalty_s: float
    penalty_reason: str | None
    cache_tokens_left: int | None
    excluded_by: str | None
    """What the client's options exclude of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A way to the next server of a chain and what computing there costs, or the way back to the client."""

    source: PeerId | None
    """None: the client."""
    target: PeerId | None
    public_name: str
    """Of the target."""
    start: int
    end: int
    delay_s: float
    """One way."""
    delay_is: str
    """``measured`` by the client, ``announced`` by the source, ``by the client`` (both ways together), ``assumed``."""
    software_s: float
    compute_s: float
    penalty_s: float
    cache_s: float
    """For an attention cache without room."""
    chance_s: float
    """Noise that spreads clients over equal servers."""

    @property
    def total_s(self) -> float:
        return self.delay_s + self.software_s + self.compute_s + self.penalty_s + self.cache_s + self.chance_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A server that is not in the chain."""

    peer_id: PeerId
    public_name: str
    start: int
    end: int
    extra_s: float | None
    """What the best chain with it costs more; None: it may not be used."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A chain for one session's steps, with its costs. Times are in seconds and per token."""

    model_name: str
    start: int
    end: int
    total_s: float
    edges: tuple[Edge, ...]
    """From the client through all servers back to the client."""
    alternatives: tuple[Alternative, ...]
    """Servers that hold some of the blocks and are not used, those that nearly were first."""

    @property
    def chain(self) -> Chain:
        """The servers in order."""
        return tuple(
            Hop(peer_id=edge.target, start=edge.start, end=edge.end) for edge in self.edges if edge.target is not None
        )

    def edge_rows(self) -> list[tuple[str, ...]]:
        """The cells of a table of the edges, under ``EDGE_COLUMNS``; times in milliseconds."""
        rows = []
        for edge in self.edges:
            who = "client" if edge.target is None else _name(edge.target, edge.public_name)
            blocks = "" if edge.target is None else f"{edge.start}:{edge.end}"
            rest = (edge.software_s, edge.compute_s, edge.penalty_s + edge.cache_s, edge.chance_s, edge.total_s)
            rows.append((who, blocks, _milliseconds(edge.delay_s), edge.delay_is, *map(_milliseconds, rest)))
        return rows

    def alternative_rows(self) -> list[tuple[str, ...]]:
        """The cells of a table of the servers that are not used, under ``ALTERNATIVE_COLUMNS``."""
        return [
            (
                _name(each.peer_id, each.public_name),
                f"{each.start}:{each.end}",
                "" if each.extra_s is None else f"+{_milliseconds(each.extra_s)}",
                each.reason,
            )
            for each in self.alternatives
        ]

    def __str__(self) -> str:
        lines = [f"{self.model_name}, blocks {self.start}:{self.end}: {_milliseconds(self.total_s)} ms a token"]
        lines += _align([EDGE_COLUMNS, *self.edge_rows()])
        if self.alternatives:
            lines += ["not used:", *_align([ALTERNATIVE_COLUMNS, *self.alternative_rows()])]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        names = ("start", "end", "delay_s", "delay_is", "software_s", "compute_s", "penalty_s", "cache_s", "chance_s")
        return {
            "model": self.model_name,
            "blocks": [self.start, self.end],
            "total_s": self.total_s,
            "edges": [
                {
                    "from": "client" if edge.source is None else str(edge.source),
                    "to": "client" if edge.target is None else str(edge.target),
                    "public_name": edge.public_name,
                    **{name: getattr(edge, name) for name in names},
                    "total_s": edge.total_s,
                }
                for edge in self.edges
            ],
            "alternatives": [
                {
                    "peer_id": str(each.peer_id),
                    **{name: getattr(each, name) for name in ("public_name", "start", "end", "extra_s", "reason")},
                }
                for each in self.alternatives
            ],
        }


def explain_chain(
    chain: Chain,
    servers: Iterable[Server],
    facts: Mapping[PeerId, Facts],
    spans: Mapping[PeerId, tuple[int, int]],
    *,
    model_name: str,
    start: int,
    end: int,
    cache_tokens: int = 0,
) -> Route:
    """Take a planned chain apart. ``facts`` and ``spans`` also have the servers that may not be used."""
    candidates = [server for server in servers if server.start < end and server.end > start]
    by_peer = {server.peer_id: server for server in candidates}
    total_s = cost_of(chain, candidates)
    edges = []
    for source, hop in zip((None, *chain), chain, strict=False):
        server = by_peer[hop.peer_id]
        known = facts[hop.peer_id]
        before = None if source is None else by_peer[source.peer_id]
        delay_s, delay_is = _delay(before, server, facts)
        is_full = known.cache_tokens_left is not None and known.cache_tokens_left < cache_tokens
        cache_s = FULL_CACHE_S if is_full else 0.0
        edges.append(
            Edge(
                source=None if source is None else source.peer_id,
                target=hop.peer_id,
                public_name=known.public_name,
                start=hop.start,
                end=hop.end,
                delay_s=delay_s,
                delay_is=delay_is,
                software_s=SOFTWARE_S,
                compute_s=(hop.end - hop.start) * server.block_s,
                penalty_s=known.penalty_s,
                cache_s=cache_s,
                chance_s=max(0.0, server.hop_s - SOFTWARE_S - known.penalty_s - cache_s),
            )
        )
    last = by_peer[chain[-1].peer_id]
    delay_s, delay_is = _delay(None, last, facts)
    edges.append(
        Edge(
            source=last.peer_id,
            target=None,
            public_name="",
            start=end,
            end=end,
            delay_s=delay_s,
            delay_is=delay_is,
            software_s=0.0,
            compute_s=0.0,
            penalty_s=0.0,
            cache_s=0.0,
            chance_s=0.0,
        )
    )
    through = dict(zip(by_peer, Lattice(candidates, start, end).cheapest_through().tolist(), strict=True))
    used = {hop.peer_id for hop in chain}
    alternatives = []
    for peer_id, (first, last_block) in spans.items():
        if peer_id in used or first >= end or last_block <= start:
            continue
        known = facts[peer_id]
        extra_s = None
        if peer_id in by_peer and known.excluded_by is None:
            extra_s = max(0.0, through[peer_id] - total_s)
            reason = _reason(by_peer[peer_id], extra_s, chain, by_peer, known, cache_tokens)
        else:
            reason = f"not allowed: {known.excluded_by or 'it came a moment ago'}"
        alternatives.append(
            Alternative(
                peer_id=peer_id,
                public_name=known.public_name,
                start=first,
                end=last_block,
                extra_s=extra_s,
                reason=reason,
            )
        )
    alternatives.sort(key=lambda each: (each.extra_s is None, each.extra_s or 0.0, each.peer_id))
    return Route(
        model_name=model_name,
        start=start,
        end=end,
        total_s=total_s,
        edges=tuple(edges),
        alternatives=tuple(alternatives),
    )


def _delay(before: Server | None, server: Server, facts: Mapping[PeerId, Facts]) -> tuple[float, str]:
    if before is None:
        return server.client_s, "measured" if facts[server.peer_id].is_measured else "assumed"
    delay_s = before.delay_to(server)
    return delay_s, "announced" if before.measured_delay_to(server) == delay_s else "by the client"


def _reason(
    server: Server,
    extra_s: float,
    chain: Chain,
    by_peer: Mapping[PeerId, Server],
    facts: Facts,
    cache_tokens: int,
) -> str:
    """What speaks most against a server, compared with those that compute its blocks."""
    if facts.penalty_s > 0.5 * extra_s and facts.penalty_s > 0.0:
        return f"penalty of {facts.penalty_s:.3g} s: {facts.penalty_reason}"
    if facts.cache_tokens_left is not None and facts.cache_tokens_left < cache_tokens:
        return f"no room in its cache: {facts.cache_tokens_left} tokens left of {cache_tokens} wanted"
    rivals = [(hop, by_peer[hop.peer_id]) for hop in chain if hop.start < server.end and hop.end > server.start]
    num_blocks = sum(min(hop.end, server.end) - max(hop.start, server.start) for hop, _ in rivals)
    compute_s = sum((min(hop.end, server.end) - max(hop.start, server.start)) * rival.block_s for hop, rival in rivals)
    client_s = sum(rival.client_s for _, rival in rivals) / len(rivals)
    slower_s = num_blocks * server.block_s - compute_s
    farther_s = server.client_s - client_s
    if extra_s <= 2 * (NOISE_S + NOISE_SHARE * (server.client_s + num_blocks * server.block_s)):
        return "as good: chance decided"
    if slower_s >= farther_s and num_blocks * server.block_s > _MUCH * compute_s:
        return f"slower: {1000 * slower_s:.3g} ms more for its {num_blocks} blocks"
    if server.client_s > _MUCH * client_s:
        text = f"farther: {1000 * farther_s:.3g} ms more to the client"
        return text if facts.is_measured else f"{text} are assumed: it was not measured"
    if any(before.start < server.start < before.end for before in chain) or any(
        hop.start < server.end < hop.end for hop in chain
    ):
        return "its span does not fit: another visit would be needed"
    return "the delays to its neighbours in a chain are longer"


def _name(peer_id: PeerId, public_name: str) -> str:
    return f"{peer_id.short} {public_name}" if public_name else peer_id.short


def _milliseconds(duration_s: float) -> str:
    return f"{1000 * duration_s:.2f}"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
