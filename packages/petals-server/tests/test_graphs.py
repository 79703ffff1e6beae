"""Kept graphs never take more than their budget, whoever asks for what in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_core.identity import Identity
from petals_server.graphs import MAX_GRAPHS_PER_PEER, Graph, GraphStore

PEERS = [Identity.ephemeral().peer_id for _ in range(3)]
BUDGET = 100

actions = st.lists(
    st.tuples(
        st.sampled_from(["keep", "take", "drop", "give up", "expire"]),
        st.integers(0, 2),
        st.integers(0, 3),
        st.lists(st.integers(1, 60), max_size=4),
    ),
    max_size=40,
)


@given(actions)
def test_the_budget_is_kept(steps: list[tuple[str, int, int, list[int]]]) -> None:
    store = GraphStore(budget_bytes=BUDGET, lifetime_s=5.0)
    taken: list[Graph] = []
    for now_s, (action, peer, name, sizes) in enumerate(steps):
        graph_id = bytes([name]) * 16
        if action in ("keep", "give up"):
            graph = Graph(peer_id=PEERS[peer])
            whole = all(store.grow(graph, size) for size in sizes)
            if action == "give up" or not whole:
                store.drop(graph)
            else:
                store.keep(graph_id, graph, now_s=now_s)
        elif action == "take":
            found = store.take(PEERS[peer], graph_id, now_s=now_s)
            if found is not None:
                assert not found.is_dropped
                taken.append(found)
        elif action == "drop" and taken:
            store.drop(taken.pop())
        elif action == "expire":
            store.drop_expired(now_s=now_s)
        assert 0 <= store.num_bytes <= BUDGET
    for graph in taken:
        store.drop(graph)
    store.drop_expired(now_s=1e9)
    assert (store.num_bytes, len(store)) == (0, 0)


def test_the_one_who_has_the_most_gives_way() -> None:
    store = GraphStore(budget_bytes=BUDGET, lifetime_s=5.0)
    for name in range(3):
        graph = Graph(peer_id=PEERS[0])
        assert store.grow(graph, 30)
        store.keep(bytes([name]) * 16, graph, now_s=0.0)
    other = Graph(peer_id=PEERS[1])
    assert store.grow(other, 30)
    store.keep(bytes(16), other, now_s=0.0)
    assert store.take(PEERS[0], bytes([0]) * 16, now_s=0.0) is None
    assert store.take(PEERS[0], bytes([2]) * 16, now_s=0.0) is not None
    assert store.take(PEERS[1], bytes(16), now_s=0.0) is other


def test_the_number_of_graphs_is_bounded() -> None:
    store = GraphStore(budget_bytes=1 << 40, lifetime_s=5.0)
    for number in range(MAX_GRAPHS_PER_PEER + 10):
        store.keep(number.to_bytes(16), Graph(peer_id=PEERS[0]), now_s=0.0)
    assert len(store) == MAX_GRAPHS_PER_PEER
