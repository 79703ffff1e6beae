"""The planner against all possible chains of small swarms."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.errors import MissingBlocksError
from petals_core.identity import PeerId
from petals_core.routing.graph import Hop, Server, describe_blocks, find_gaps
from petals_core.routing.planner import plan_chain

NUM_BLOCKS = 5


def peer(number: int) -> PeerId:
    return PeerId(hashlib.sha256(bytes([number])).digest())


def server(number: int, start: int, end: int, *, hop_s: float = 1.0, block_s: float = 1.0) -> Server:
    return Server(peer_id=peer(number), start=start, end=end, hop_s=hop_s, block_s=block_s)


def plan(servers: list[Server], start: int = 0, end: int = NUM_BLOCKS, seed: int = 0) -> tuple[Hop, ...]:
    return plan_chain(servers, start, end, model_name="tiny", rng=random.Random(seed))


def cost(chain: tuple[Hop, ...], servers: list[Server]) -> float:
    by_peer = {each.peer_id: each for each in servers}
    return sum(by_peer[hop.peer_id].hop_s + (hop.end - hop.start) * by_peer[hop.peer_id].block_s for hop in chain)


def cheapest(servers: list[Server], block: int, end: int) -> float:
    """By trying everything."""
    if block == end:
        return 0.0
    return min(
        (
            each.hop_s + (last - block) * each.block_s + cheapest(servers, last, end)
            for each in servers
            if each.start <= block < each.end
            for last in range(block + 1, min(each.end, end) + 1)
        ),
        default=float("inf"),
    )


spans = st.integers(0, NUM_BLOCKS - 1).flatmap(
    lambda start: st.tuples(st.just(start), st.integers(start + 1, NUM_BLOCKS), st.integers(0, 4), st.integers(0, 4))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(spans, min_size=1, max_size=6), st.integers(0, 9))
def test_no_chain_is_cheaper(drawn: list[tuple[int, int, int, int]], seed: int) -> None:
    servers = [server(i, a, b, hop_s=hop, block_s=block) for i, (a, b, hop, block) in enumerate(drawn)]
    gaps = find_gaps([(each.start, each.end) for each in servers], 0, NUM_BLOCKS)
    if gaps:
        with pytest.raises(MissingBlocksError):
            plan(servers, seed=seed)
        return
    chain = plan(servers, seed=seed)
    assert (chain[0].start, chain[-1].end) == (0, NUM_BLOCKS)
    assert all(before.end == after.start for before, after in pairwise(chain))
    by_peer = {each.peer_id: each for each in servers}
    assert all(by_peer[hop.peer_id].start <= hop.start < hop.end <= by_peer[hop.peer_id].end for hop in chain)
    assert cost(chain, servers) == pytest.approx(cheapest(servers, 0, NUM_BLOCKS))


def test_fewer_hops_are_cheaper_at_equal_speed() -> None:
    chain = plan([server(0, 0, 2), server(1, 2, 5), server(2, 0, 5)])
    assert chain == (Hop(peer_id=peer(2), start=0, end=5),)


def test_equals_share_the_load() -> None:
    servers = [server(number, 0, 5) for number in range(4)]
    chosen = {plan(servers, seed=seed)[0].peer_id for seed in range(64)}
    assert chosen == {each.peer_id for each in servers}


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
