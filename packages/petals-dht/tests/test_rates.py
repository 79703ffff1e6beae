from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_dht.rates import Rate, RateLimiter


@given(st.lists(st.floats(0, 2), min_size=1, max_size=100))
def test_never_more_than_burst_and_rate(pauses: list[float]) -> None:
    limiter = RateLimiter(Rate(per_s=2, burst=5))
    now_s, num_admitted = 0.0, 0
    for pause_s in pauses:
        now_s += pause_s
        num_admitted += limiter.admit("source", now_s=now_s)
        assert num_admitted <= 5 + 2 * now_s + 1e-6


def test_sources_do_not_share() -> None:
    limiter = RateLimiter(Rate(per_s=1, burst=1))
    assert limiter.admit("a", now_s=0)
    assert not limiter.admit("a", now_s=0.5)
    assert limiter.admit("b", now_s=0.5)
    assert limiter.admit("a", now_s=1.5)


def test_memory_is_bounded() -> None:
    limiter = RateLimiter(Rate(per_s=1, burst=1), max_sources=2)
    for source in ("a", "b", "c"):
        assert limiter.admit(source, now_s=0)
    assert not limiter.admit("c", now_s=0)
    assert limiter.admit("a", now_s=0), "the source unused for longest was forgotten"
