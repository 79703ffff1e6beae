"""Waiting adapts to what steps take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_client.patience import FIRST_WAIT_S, MAX_WAIT_S, Patience

durations = st.lists(st.floats(0.0001, 20.0), min_size=1, max_size=50)


def test_nothing_is_known_at_first() -> None:
    assert Patience().wait_s(is_decode=True) == FIRST_WAIT_S


@given(durations)
def test_never_shorter_than_what_is_normal(taken: list[float]) -> None:
    patience = Patience()
    for duration_s in taken:
        patience.note(duration_s, is_decode=True)
    assert min(*taken, MAX_WAIT_S) <= patience.wait_s(is_decode=True) <= MAX_WAIT_S


def test_it_adapts() -> None:
    patience = Patience()
    for _ in range(50):
        patience.note(0.01, is_decode=True)
    assert patience.wait_s(is_decode=True) < 0.3
    assert patience.wait_s(is_decode=False) == FIRST_WAIT_S, "a prompt's parts are another matter"
    for _ in range(50):
        patience.note(1.0, is_decode=True)
    assert 1.5 < patience.wait_s(is_decode=True) < 3.0


def test_parts_that_come_together_say_nothing() -> None:
    patience = Patience()
    for number in range(80):
        patience.note(0.8 if number % 8 == 0 else 0.0001, is_decode=False)
        assert patience.wait_s(is_decode=False) > 1.5


def test_longer_each_time_in_vain() -> None:
    patience = Patience()
    waits = [patience.wait_s(is_decode=True, num_looks=looks) for looks in range(6)]
    assert waits == sorted(waits)
    assert waits[1] == 2 * waits[0]
    assert waits[-1] == MAX_WAIT_S


def test_a_far_server_gets_more_time_to_answer() -> None:
    assert Patience.probe_s(0.5) > Patience.probe_s(0.001)
