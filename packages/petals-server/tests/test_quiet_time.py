"""Weights stay as gradients need them for exactly as long as somebody may want one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_server.quiet_time import QUIET_S, QuietTime


def test_at_first_there_is_nothing_to_wait_for() -> None:
    assert QuietTime().left_s(0.0, num_graphs=0) == 0


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 2 * QUIET_S)), max_size=20), st.integers(0, 1))
def test_the_quiet_time_begins_with_the_end_of_the_last_gradient(
    events: list[tuple[bool, float]], num_graphs: int
) -> None:
    """``events``: a gradient begins, or one that is under way ends, and how much later it does."""
    quiet, now_s, num_wanted, ended_s = QuietTime(), 1e3, 0, 0.0
    for is_begin, later_s in events:
        now_s += later_s
        if is_begin:
            quiet.begin()
            num_wanted += 1
        elif num_wanted:
            quiet.end(now_s)
            num_wanted, ended_s = num_wanted - 1, now_s
        assert quiet.is_wanted == (num_wanted > 0)
        left_s = quiet.left_s(now_s, num_graphs=num_graphs)
        if num_wanted or num_graphs:
            assert left_s is None
        else:
            assert left_s is not None
            assert (left_s == 0) == (ended_s + QUIET_S <= now_s)
            assert quiet.left_s(now_s + left_s + 1e-3, num_graphs=0) == 0
