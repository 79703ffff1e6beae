"""A simulated chain: the window keeps its slowest stage busy, and holds little more than that takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_client.window import (
    MAX_PART_TOKENS,
    MIN_PART_TOKENS,
    FlightWindow,
    choose_batch_sizes,
    choose_join_tokens,
    choose_part_sizes,
    choose_part_tokens,
)


def simulate(stages_s: list[float], delay_s: float, num_parts: int) -> tuple[float, int]:
    """Send parts through stages that work one part at a time, with a delay between; returns the time, and the most
    parts that were under way."""
    window = FlightWindow(len(stages_s), part_tokens=64)
    free_s = [0.0] * len(stages_s)
    under_way: list[tuple[float, float]] = []
    now_s, most = 0.0, 0
    for _ in range(num_parts):
        while not window.has_room:
            sent_s, now_s = under_way.pop(0)
            window.done(num_tokens=64, trip_s=now_s - sent_s, now_s=now_s)
        at_s = now_s
        for index, stage_s in enumerate(stages_s):
            at_s = free_s[index] = max(at_s + delay_s, free_s[index]) + stage_s
        window.sent(64)
        under_way.append((now_s, at_s))
        most = max(most, window.tokens_in_flight // 64)
    return under_way[-1][1], most


@settings(max_examples=50)
@given(st.lists(st.floats(0.005, 0.1), min_size=1, max_size=6), st.floats(0.0, 0.1))
def test_the_slowest_stage_is_kept_busy(stages_s: list[float], delay_s: float) -> None:
    num_parts = 100
    total_s, _ = simulate(stages_s, delay_s, num_parts)
    fill_s = sum(stages_s) + delay_s * len(stages_s)
    # What the window costs while it learns is a part of a few trips.
    assert total_s <= max(stages_s) * num_parts * 1.2 + 3 * fill_s


def test_little_is_under_way_where_nothing_is_far() -> None:
    _, most = simulate([0.05, 0.05, 0.05], 0.0, 100)
    assert most <= 3 * 7  # links and servers, while nothing is known


def test_much_is_under_way_where_all_is_far() -> None:
    _, most = simulate([0.005, 0.005], 0.2, 200)
    assert most > 20


@pytest.mark.parametrize("num_hops", [1, 3, 8])
def test_parts_are_many_and_not_tiny(num_hops: int) -> None:
    assert choose_part_tokens(1, num_hops) >= 32
    assert choose_part_tokens(10**6, num_hops) == MAX_PART_TOKENS
    assert [choose_part_tokens(num_tokens, 3) for num_tokens in (256, 512, 1024, 2048, 4096)] == [32, 64, 128, 192, 256]


def test_joined_parts_leave_two_for_each_stage() -> None:
    assert [choose_join_tokens(num_tokens, 3) for num_tokens in (1, 256, 512, 2048, 10**6)] == [32, 32, 64, 256, 512]
    assert choose_join_tokens(2048, 7) == 128


@given(
    st.integers(1, 20_000),
    st.integers(1, 12),
    st.integers(1, 4096),
    st.none() | st.integers(1, 4096),
    st.none() | st.floats(1, 1e9),
)
def test_sizes_add_up_and_are_small_at_the_ends(
    num_tokens: int, num_hops: int, max_tokens: int, part_tokens: int | None, link_bytes_per_s: float | None
) -> None:
    sizes = choose_part_sizes(
        num_tokens,
        num_hops,
        max_tokens=max_tokens,
        part_tokens=part_tokens,
        token_bytes=4096,
        link_bytes_per_s=link_bytes_per_s,
    )
    assert sum(sizes) == num_tokens
    assert 0 < min(sizes) <= max(sizes) <= max_tokens
    if part_tokens is not None:
        assert len(set(sizes[:-1])) <= 1
    elif max(sizes) >= MIN_PART_TOKENS and num_tokens >= 8 * max(sizes):
        assert (sizes[0], sizes[-1]) == (3, 8)
    if link_bytes_per_s is not None and part_tokens is None:
        assert max(sizes) <= max(MIN_PART_TOKENS, 0.07 * link_bytes_per_s / 4096)


def test_sizes_of_a_prompt() -> None:
    def sizes(num_tokens: int, link_bytes_per_s: float | None) -> list[int]:
        return choose_part_sizes(num_tokens, 3, max_tokens=4096, token_bytes=4096, link_bytes_per_s=link_bytes_per_s)

    assert sizes(2048, 12e6) == [3, 6, 12, 24, 48, 96, *[192] * 8, 75, 128, 64, 32, 16, 8]
    assert sizes(2048, 2.4e6) == [3, 6, 12, 24, *[32] * 61, 27, 16, 8]
    assert sizes(2048, None) == [3, 6, 12, 24, 48, *[64] * 29, 43, 32, 16, 8]
    assert sizes(1, None) == [1]
    assert sizes(100, None) == [32, 32, 32, 4]


@given(st.lists(st.integers(1, 600), min_size=1, max_size=30), st.none() | st.floats(1, 1e9))
def test_micro_batches_are_cut_as_a_prompt_and_where_one_ends(
    batches: list[int], link_bytes_per_s: float | None
) -> None:
    link = {"max_tokens": 512, "token_bytes": 4096, "link_bytes_per_s": link_bytes_per_s}
    whole = choose_part_sizes(sum(batches), 3, **link)
    sizes = choose_batch_sizes(batches, 3, **link)
    assert [sum(each) for each in sizes] == batches
    assert all(0 < size <= max(192, *whole) for each in sizes for size in each)
    if link_bytes_per_s is None:
        assert sizes[0][0] == min(whole[0], batches[0])
        assert sizes[-1][-1] == min(whole[-1], batches[-1])


def test_sizes_of_a_batch() -> None:
    def sizes(batches: list[int], link_bytes_per_s: float) -> list[list[int]]:
        return choose_batch_sizes(batches, 3, max_tokens=4096, token_bytes=4096, link_bytes_per_s=link_bytes_per_s)

    slow = [[3, 6, 12, 24, 32, 32, 19], *[[32, 32, 32, 32]] * 14, [13, 32, 32, 27, 16, 8]]
    assert sizes([128] * 16, 2.4e6) == slow
    assert sizes([128] * 16, 12e6) == [[128]] * 16
    assert sizes([64, 224], 12e6) == [[64], [192, 32]]


@pytest.mark.parametrize(("round_trip_s", "first"), [(0.0005, 192), (0.04, 3), (None, 3)])
def test_no_part_is_small_where_all_is_near(round_trip_s: float | None, first: int) -> None:
    sizes = choose_part_sizes(
        2048, 3, max_tokens=512, token_bytes=4096, link_bytes_per_s=1e8, round_trip_s=round_trip_s
    )
    assert sizes[0] == first
    assert sum(sizes) == 2048


def test_trips_of_small_parts_say_nothing_of_large_ones() -> None:
    """A link takes a part whole before the next server begins, so a large one is under way for longer."""
    window = FlightWindow(3, part_tokens=128)
    for number in range(30):
        num_tokens, trip_s = (32, 0.2) if number < 2 else (128, 0.8)
        window.sent(num_tokens)
        window.done(num_tokens=num_tokens, trip_s=trip_s, now_s=0.1 * number)
    assert 0.8 / 0.1 <= window.limit_tokens / 128 <= 2 * 0.8 / 0.1 + 1


@pytest.mark.parametrize(("join_tokens", "least"), [(1, 3), (64, 3), (128, 3 * 3), (192, 3 * 5)])
def test_servers_that_are_slow_have_parts_to_join(join_tokens: int, least: int) -> None:
    window = FlightWindow(3, part_tokens=64, join_tokens=join_tokens)
    for number in range(30):
        window.sent(64)
        window.done(num_tokens=64, trip_s=0.1, now_s=0.1 * number)
    assert window.limit_tokens == (least + 2) * 64


def test_little_waits_to_be_joined_where_that_would_take_long() -> None:
    window = FlightWindow(3, part_tokens=32, join_tokens=256)
    for number in range(60):
        window.sent(32)
        window.done(num_tokens=32, trip_s=2.0, now_s=1.0 * number)
    assert window.limit_tokens == 10 * 32


def test_small_parts_fill_little() -> None:
    """All of a prompt's last parts may be under way while as many of the full size are not."""
    window = FlightWindow(3, part_tokens=128)
    for number in range(30):
        window.sent(128)
        window.done(num_tokens=128, trip_s=0.1, now_s=0.1 * number)
    num_sent = 0
    while window.has_room:
        window.sent(8)
        num_sent += 1
    assert num_sent == 5 * 16


def test_an_interruption_says_nothing_of_the_rate() -> None:
    window = FlightWindow(3, part_tokens=64)
    for number in range(60):
        window.sent(64)
        window.done(num_tokens=64, trip_s=1.0, now_s=0.1 * number)
    limit_tokens = window.limit_tokens
    window.begin_again()
    assert window.tokens_in_flight == 0
    for number in range(2):
        window.sent(64)
        window.done(num_tokens=64, trip_s=1.0, now_s=100 + 0.1 * number)
    assert window.limit_tokens == limit_tokens


@pytest.mark.parametrize("together", [2, 6])
def test_results_that_come_together_do_not_look_like_a_fast_chain(together: int) -> None:
    """Some parts in a moment and then none for as long as these take: the rate is that of all."""
    window = FlightWindow(3, part_tokens=64)
    for number in range(80):
        window.sent(64)
        window.done(
            num_tokens=64, trip_s=0.6, now_s=0.1 * together * (number // together) + 0.0001 * (number % together)
        )
        if number > 40:
            assert 0.5 * 0.6 / 0.1 <= window.limit_tokens / 64 <= 2 * 0.6 / 0.1


@pytest.mark.parametrize(("token_bytes", "first"), [(512, 8), (2048, 6), (4096, 3), (28_672, 3)])
def test_a_first_part_fits_the_first_round_trip_where_that_holds_enough(token_bytes: int, first: int) -> None:
    sizes = choose_part_sizes(2048, 3, max_tokens=512, token_bytes=token_bytes, link_bytes_per_s=None)
    assert sizes[:3] == [first, 2 * first, 4 * first]
