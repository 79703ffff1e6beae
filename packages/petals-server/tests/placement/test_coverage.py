import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_server.placement.coverage import Coverage, Offer, Placed


def placed(start: int, end: int, speed: float = 1.0, *, steady: bool = True, name: bytes = b"a") -> Placed:
    return Placed(peer_id=name, start=start, end=end, tokens_per_s=speed, is_steady=steady)


def spans(num_blocks: int) -> st.SearchStrategy[list[Placed]]:
    span = st.tuples(
        st.integers(0, num_blocks - 1), st.integers(1, num_blocks), st.floats(0.5, 4.0), st.booleans()
    ).map(lambda drawn: placed(drawn[0], min(num_blocks, drawn[0] + drawn[1]), drawn[2], steady=drawn[3]))
    return st.lists(span, max_size=8)


def test_blocks_that_are_promised_are_not_dark_and_have_no_holder() -> None:
    coverage = Coverage(4, [placed(0, 2), placed(1, 3, steady=False)])
    assert coverage.holders.tolist() == [1, 1, 0, 0]
    assert coverage.is_dark.tolist() == [False, False, False, True]
    assert coverage.speeds.tolist() == [1, 2, 1, 0]
    assert coverage.throughput == 0
    assert coverage.bound == 1


@given(spans(6))
def test_counting_out_what_was_counted_in_leaves_nothing(servers: list[Placed]) -> None:
    coverage = Coverage(6, servers)
    for server in servers:
        coverage.remove(server)
    assert coverage.is_dark.all()
    assert coverage.num_servers == 0
    assert coverage.throughput == 0
    assert coverage.speeds.tolist() == pytest.approx([0.0] * 6, abs=1e-9)


@given(spans(6))
def test_no_placement_exceeds_the_bound(servers: list[Placed]) -> None:
    coverage = Coverage(6, servers)
    assert coverage.throughput <= coverage.bound + 1e-9
    assert coverage.soft_throughput() <= coverage.bound * (1 + 1e-9)


@given(spans(6), st.integers(1, 6), st.floats(0.5, 4.0))
def test_the_window_is_the_best_of_all(servers: list[Placed], length: int, speed: float) -> None:
    coverage = Coverage(6, servers)
    window = coverage.choose_window([Offer(num_blocks=length, tokens_per_s=speed)])
    assert window.end - window.start == length

    def value(start: int) -> tuple[int, float]:
        with_it = Coverage(6, [*servers, placed(start, start + length, speed)])
        return int(coverage.is_dark[start : start + length].sum()), with_it.soft_throughput()

    best = max(value(start) for start in range(6 - length + 1))
    num_lit, throughput = value(window.start)
    assert num_lit == best[0]
    assert throughput == pytest.approx(best[1], rel=1e-6)


def test_servers_that_start_one_after_another_tile_the_model() -> None:
    coverage = Coverage(8)
    for _ in range(4):
        window = coverage.choose_window([Offer(num_blocks=2, tokens_per_s=1.0)])
        coverage.add(placed(window.start, window.end))
    assert coverage.speeds.tolist() == [1] * 8


def test_a_shorter_span_is_taken_where_the_longest_would_leave_a_gap() -> None:
    coverage = Coverage(8, [placed(0, 3), placed(3, 6)])
    offers = [Offer(num_blocks=3, tokens_per_s=1.0), Offer(num_blocks=2, tokens_per_s=1.5)]
    window = coverage.choose_window(offers)
    assert (window.start, window.end, window.tokens_per_s) == (6, 8, 1.5)


def test_no_more_blocks_than_there_are() -> None:
    with pytest.raises(ValueError, match="no spans"):
        Coverage(4).choose_window([Offer(num_blocks=5, tokens_per_s=1.0)])
