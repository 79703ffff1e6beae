"""A batch divided among chains."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.errors import MissingBlocksError
from petals_core.identity import PeerId
from petals_core.routing.flow import Branch, split_flow
from petals_core.routing.graph import Server


def peer(number: int) -> PeerId:
    return PeerId(hashlib.sha256(bytes([number])).digest())


def server(number: int, start: int, end: int, block_s: float = 1.0, **costs: float) -> Server:
    return Server(
        peer_id=peer(number),
        start=start,
        end=end,
        block_s=block_s,
        client_s=costs.get("client_s", 0.01),
        hop_s=costs.get("hop_s", 0.0),
    )


def split(servers: Sequence[Server], max_chains: int = 4) -> tuple[Branch, ...]:
    return split_flow(servers, 0, 6, model_name="tiny", max_chains=max_chains)


def shares(branches: Sequence[Branch]) -> dict[PeerId, float]:
    """What part of the batch passes each server."""
    result: Counter[PeerId] = Counter()
    for branch in branches:
        for hop in branch.chain:
            result[hop.peer_id] += branch.share  # type: ignore[assignment]  # a counter of floats
    return dict(result)


def test_equals_share() -> None:
    found = shares(split([server(0, 0, 6), server(1, 0, 6), server(2, 0, 6)]))
    assert found == {peer(number): pytest.approx(1 / 3) for number in range(3)}


def test_who_has_no_stand_in_is_in_all_chains() -> None:
    branches = split([server(0, 0, 3, block_s=0.5), server(1, 3, 6), server(2, 3, 6)])
    found = shares(branches)
    assert len(branches) == 2
    assert found == {peer(0): pytest.approx(1.0), peer(1): pytest.approx(0.5), peer(2): pytest.approx(0.5)}


def test_the_faster_one_gets_more_and_the_hopeless_one_nothing() -> None:
    found = shares(split([server(0, 0, 6), server(1, 0, 6, block_s=2.0), server(2, 0, 6, block_s=100.0)]))
    assert found[peer(0)] == pytest.approx(2 / 3, abs=0.09)
    assert peer(2) not in found


def test_a_banned_server_is_left_out() -> None:
    assert peer(1) not in shares(split([server(0, 0, 6, block_s=0.1), server(1, 0, 6, block_s=0.1, hop_s=20.0)]))


def test_one_chain_where_only_one_is_wanted() -> None:
    assert len(split([server(0, 0, 6), server(1, 0, 6)], max_chains=1)) == 1


def test_missing_blocks() -> None:
    with pytest.raises(MissingBlocksError, match="block 5 of tiny"):
        split([server(0, 0, 5)])


spans = st.integers(0, 5).flatmap(
    lambda start: st.tuples(st.just(start), st.integers(start + 1, 6), st.sampled_from([0.5, 1.0, 2.0]))
)


@settings(max_examples=40)
@given(st.lists(spans, max_size=5))
def test_branches_are_whole_chains_and_never_slower_than_one(drawn: list[tuple[int, int, float]]) -> None:
    servers = [server(9, 0, 6)] + [server(number, *each) for number, each in enumerate(drawn)]
    by_peer = {each.peer_id: each for each in servers}

    def rate(branches: Sequence[Branch]) -> float:
        """Parts per second: the busiest server decides."""
        busy: Counter[PeerId] = Counter()
        for branch in branches:
            for hop in branch.chain:
                busy_s = branch.share * (hop.end - hop.start) * by_peer[hop.peer_id].block_s
                busy[hop.peer_id] += busy_s  # type: ignore[assignment]  # a counter of floats
        return 1 / max(busy.values())

    branches = split(servers)
    assert sum(branch.share for branch in branches) == pytest.approx(1.0)
    assert len(branches) <= 4
    for branch in branches:
        position = 0
        for hop in branch.chain:
            assert hop.start == position
            assert by_peer[hop.peer_id].start <= hop.start < hop.end <= by_peer[hop.peer_id].end
            position = hop.end
        assert position == 6
    assert rate(branches) >= 0.9 * rate(split(servers, max_chains=1))
