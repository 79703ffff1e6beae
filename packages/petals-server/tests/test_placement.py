import pytest

from petals_server.placement import choose_span, count_coverage


def test_coverage_counts_spans_and_ignores_what_lies_outside() -> None:
    assert count_coverage([(0, 2), (1, 3), (2, 99)], 4) == [1, 2, 2, 1]
    assert count_coverage([], 2) == [0, 0]


@pytest.mark.parametrize(
    ("coverage", "num_blocks", "expected"),
    [
        ([0, 0, 0, 0, 0, 0], 2, (0, 2)),
        ([1, 1, 0, 0, 0, 0], 2, (2, 4)),
        ([1, 1, 1, 1, 0, 0], 3, (3, 6)),
        ([3, 1, 1, 3, 2, 2], 2, (1, 3)),
        ([0, 5, 5, 0, 0, 5], 2, (3, 5)),
        # One block that nobody holds outweighs everything else.
        ([9, 9, 0, 9, 1, 1, 1], 3, (2, 5)),
        ([2, 1, 2], 3, (0, 3)),
    ],
)
def test_the_least_covered_window_is_chosen(coverage: list[int], num_blocks: int, expected: tuple[int, int]) -> None:
    assert choose_span(coverage, num_blocks) == expected


def test_servers_that_start_one_after_another_tile_the_model() -> None:
    spans: list[tuple[int, int]] = []
    for _ in range(6):
        spans.append(choose_span(count_coverage(spans, 12), 4))
    assert spans == [(0, 4), (4, 8), (8, 12)] * 2


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_windows_that_do_not_exist_are_our_own_mistake(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="blocks"):
        choose_span([0, 0, 0], num_blocks)
