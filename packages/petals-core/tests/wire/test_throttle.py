import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.wire.throttle import Throttle


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 0.5)), min_size=1, max_size=30))
def test_no_more_is_sent_than_the_limit_and_one_burst(writes: list[tuple[int, float]]) -> None:
    throttle, now_s, sent = Throttle(10_000), 0.0, 0
    for num_bytes, idle_s in writes:
        now_s += idle_s
        sent += num_bytes
        now_s += throttle.spend(num_bytes, now_s=now_s)
        assert sent <= 10_000 * (now_s + 0.05) + 1e-3


def test_silence_earns_one_burst_only() -> None:
    throttle = Throttle(1000)
    assert throttle.spend(50, now_s=100.0) == 0
    assert throttle.spend(100, now_s=100.0) == pytest.approx(0.1)
    assert throttle.spend(50, now_s=1000.0) == 0
    assert throttle.spend(1, now_s=1000.0) > 0


def test_those_who_share_it_wait_in_turn() -> None:
    throttle = Throttle(1000)
    throttle.spend(50, now_s=0.0)
    assert throttle.spend(1000, now_s=0.0) == pytest.approx(1.0)
    assert throttle.spend(10, now_s=0.0) == pytest.approx(1.01)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing through"):
        Throttle(0)
