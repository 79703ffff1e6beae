"""The planner against all possible chains of small swarms."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.errors import MissingBlocksError
from petals_core.identity import PeerId
from petals_core.next_delays import NextDelays
from petals_core.routing.graph import Hop, Server, describe_blocks, find_gaps
from petals_core.routing.planner import Lattice, cost_of, plan_chain

NUM_BLOCKS = 5


def peer(number: int) -> PeerId:
    return PeerId(hashlib.sha256(bytes([number])).digest())


def server(
    number: int,
    start: int,
    end: int,
    *,
    client_s: float = 0.5,
    hop_s: float = 0.0,
    block_s: float = 1.0,
    delays: dict[int, float] | None = None,
) -> Server:
    return Server(
        peer_id=peer(number),
        start=start,
        end=end,
        client_s=client_s,
        hop_s=hop_s,
        block_s=block_s,
        next_delays=NextDelays.of((peer(other).digest, delay_s) for other, delay_s in (delays or {}).items()),
    )


def plan(
    servers: list[Server],
    start: int = 0,
    end: int = NUM_BLOCKS,
    previous: Server | None = None,
    following: Server | None = None,
) -> tuple[Hop, ...]:
    return plan_chain(servers, start, end, model_name="tiny", previous=previous, following=following)


def cheapest(
    servers: list[Server],
    block: int = 0,
    end: int = NUM_BLOCKS,
    previous: Server | None = None,
    following: Server | None = None,
    through: Server | None = None,
) -> float:
    """By trying everything: the cost of the best chain, of those with ``through`` in it if that is given."""
    best = math.inf
    for each in servers:
        if not each.start <= block < each.end:
            continue
        arrival = each.client_s if previous is None else previous.delay_to(each)
        wanted = None if each is through else through
        for last in range(block + 1, min(each.end, end) + 1):
            cost = arrival + each.hop_s + (last - block) * each.block_s
            if last < end:
                # Leaving a server and coming back at once is no other chain: the visit only costs.
                cost += cheapest(servers, last, end, each, following, wanted)
            elif wanted is None:
                cost += each.client_s if following is None else each.delay_to(following)
            else:
                continue
            best = min(best, cost)
    return best


spans = st.integers(0, NUM_BLOCKS - 1).flatmap(
    lambda start: st.tuples(st.just(start), st.integers(start + 1, NUM_BLOCKS), *[st.integers(0, 4)] * 3)
)
pairs = st.dictionaries(st.tuples(st.integers(0, 6), st.integers(0, 6)), st.integers(0, 9), max_size=12)


def build(drawn: list[tuple[int, int, int, int, int]], known: dict[tuple[int, int], int]) -> list[Server]:
    """Servers with any delays between them, those that break the triangle inequality too."""
    return [
        server(
            number,
            start,
            end,
            client_s=client,
            hop_s=hop,
            block_s=block,
            delays={other: delay for (one, other), delay in known.items() if one == number and other != number},
        )
        for number, (start, end, client, hop, block) in enumerate(drawn)
    ]


@settings(max_examples=150)
@given(st.lists(spans, min_size=1, max_size=6), pairs, st.booleans(), st.booleans())
def test_no_chain_is_cheaper(
    drawn: list[tuple[int, int, int, int, int]], known: dict[tuple[int, int], int], within: bool, behind: bool
) -> None:
    servers = build(drawn, known)
    gaps = find_gaps([(each.start, each.end) for each in servers], 0, NUM_BLOCKS)
    if gaps:
        with pytest.raises(MissingBlocksError):
            plan(servers)
        return
    ends = {
        "previous": server(6, 0, 1, client_s=2, delays={0: 1, 1: 5}) if within else None,
        "following": server(5, 0, 1, client_s=3) if behind else None,
    }
    chain = plan(servers, **ends)
    assert (chain[0].start, chain[-1].end) == (0, NUM_BLOCKS)
    assert all(before.end == after.start for before, after in pairwise(chain))
    by_peer = {each.peer_id: each for each in servers}
    assert all(by_peer[hop.peer_id].start <= hop.start < hop.end <= by_peer[hop.peer_id].end for hop in chain)
    assert cost_of(chain, servers, **ends) == pytest.approx(cheapest(servers, **ends))


@settings(max_examples=60)
@given(st.lists(spans, min_size=1, max_size=5), pairs)
def test_the_cheapest_chain_through_each_server(
    drawn: list[tuple[int, int, int, int, int]], known: dict[tuple[int, int], int]
) -> None:
    servers = [*build(drawn, known), server(6, 0, NUM_BLOCKS, client_s=2.0)]
    through = Lattice(servers, 0, NUM_BLOCKS).cheapest_through()
    for each, cost in zip(servers, through, strict=True):
        assert cost == pytest.approx(cheapest(servers, through=each))


def test_delays_to_servers_that_are_not_there_count_for_nothing() -> None:
    """Digests before, between and behind those of all servers; one has the first eight bytes of a server's."""
    similar = peer(1).digest[:8] + bytes(24)
    strangers = NextDelays.of((digest, 0.0) for digest in (bytes(32), peer(9).digest, b"\xff" * 32, similar))
    first = server(0, 0, 2)._replace(next_delays=strangers)
    chain = plan([first, server(1, 2, 5)])
    assert [hop.peer_id for hop in chain] == [peer(0), peer(1)]
    assert Lattice([first, server(1, 2, 5)], 0, NUM_BLOCKS).cheapest_through().tolist() == pytest.approx([7.0, 7.0])


def test_fewer_hops_are_cheaper_at_equal_speed() -> None:
    chain = plan([server(0, 0, 2), server(1, 2, 5), server(2, 0, 5)])
    assert chain == (Hop(peer_id=peer(2), start=0, end=5),)


def test_neighbours_beat_servers_that_are_nearer_to_the_client() -> None:
    """Two servers far away but beside each other, and two that are nearer, at opposite ends."""
    near = [server(0, 0, 3, client_s=0.04), server(1, 3, 5, client_s=0.04)]
    far = [server(2, 0, 3, client_s=0.05, delays={3: 0.001}), server(3, 3, 5, client_s=0.05)]
    assert [hop.peer_id for hop in plan(near + far)] == [peer(2), peer(3)]


def test_a_replacement_stands_between_its_neighbours() -> None:
    before = server(0, 0, 2, delays={1: 0.4, 2: 0.1})
    after = server(3, 4, 5)
    candidates = [server(1, 2, 4, client_s=0.2), server(2, 2, 4, client_s=0.6, delays={3: 0.1})]
    assert plan(candidates, 2, 4)[0].peer_id == peer(1)
    assert plan(candidates, 2, 4, previous=before, following=after)[0].peer_id == peer(2)


def test_missing_blocks_are_named() -> None:
    with pytest.raises(MissingBlocksError, match="blocks 1:2 and 4:5 of tiny are held by no live server"):
        plan([server(0, 0, 1), server(1, 2, 4)])
    with pytest.raises(MissingBlocksError, match="block 4 of tiny is held by no live server"):
        plan([server(0, 0, 4)])


def test_part_of_a_model() -> None:
    assert plan([server(0, 0, 5)], 2, 4) == (Hop(peer_id=peer(0), start=2, end=4),)


@pytest.mark.parametrize(
    ("given_spans", "gaps", "text"),
    [
        ([], [(0, 5)], "blocks 0:5"),
        ([(0, 5)], [], None),
        ([(1, 2), (0, 1), (3, 9)], [(2, 3)], "block 2"),
        ([(1, 2), (4, 5)], [(0, 1), (2, 4)], "blocks 0:1 and 2:4"),
    ],
)
def test_gaps(given_spans: list[tuple[int, int]], gaps: list[tuple[int, int]], text: str | None) -> None:
    assert find_gaps(given_spans, 0, 5) == gaps
    if text is not None:
        assert describe_blocks(gaps) == text
