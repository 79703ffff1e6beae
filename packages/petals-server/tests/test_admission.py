"""Room in the cache: who gets it, who waits, and that it always adds up."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from petals_server.admission import (
    MAX_RETRY_S,
    MIN_RETRY_S,
    PATIENCE_S,
    Account,
    Admission,
    Outcome,
    Verdict,
)

FOREVER_S = 1e9


def make(total: int, *, max_sessions: int = 1000, share: float = 0.25) -> Admission:
    admission = Admission(total, max_sessions=max_sessions, default_retry_s=2.0)
    admission.promise_share = share
    return admission


def outcomes(verdicts: list[Verdict]) -> list[tuple[Account, Outcome]]:
    return [(verdict.account, verdict.outcome) for verdict in verdicts]


def enter(admission: Admission, peer_id: str, most: int, now_s: float = 0.0, wait_s: float = FOREVER_S) -> Account:
    return admission.enter(peer_id, most, now_s=now_s, deadline_s=now_s + wait_s)


def grow(admission: Admission, account: Account, wanted: int, now_s: float = 0.0) -> list[tuple[Account, Outcome]]:
    """A step that is over at once, if there is room for it."""
    if admission.grow(account, wanted, now_s=now_s, deadline_s=FOREVER_S):
        admission.settle(account, account.held)
        return [(account, Outcome.GROWN)]
    told = outcomes(admission.decide(now_s))
    if (account, Outcome.GROWN) in told:
        admission.settle(account, wanted)
    return told


def test_four_times_as_many_begin_as_if_all_was_set_aside() -> None:
    admission = make(16 * 2048)
    accounts = [enter(admission, "a", 2048) for _ in range(65)]
    assert outcomes(admission.decide(0.0)) == [(account, Outcome.ADMITTED) for account in accounts[:64]]
    for account in accounts[:64]:
        assert grow(admission, account, 400) == [(account, Outcome.GROWN)]
    assert (admission.held, admission.committed, admission.num_waiting) == (64 * 400, 16 * 2048, 1)


def test_promises_follow_what_sessions_use() -> None:
    admission = make(1000)
    for now_s in range(200):
        account = enter(admission, "a", 100)
        admission.decide(now_s)
        grow(admission, account, 100)
        admission.leave(account, now_s=now_s)
    assert admission.promise_share > 0.99
    for _ in range(200):
        account = enter(admission, "a", 100)
        admission.decide(200)
        grow(admission, account, 1)
        admission.leave(account, now_s=200)
    assert admission.promise_share == 0.125


def test_who_waits_goes_first_if_its_peer_has_least_and_then_by_arrival() -> None:
    admission = make(100, share=1.0)
    first = enter(admission, "crowd", 100)
    admission.decide(0.0)
    waiting = [enter(admission, "crowd", 40) for _ in range(3)]
    late = enter(admission, "alone", 40)
    assert admission.decide(1.0) == []
    admission.leave(first, now_s=1.0)
    assert outcomes(admission.decide(1.0)) == [(waiting[0], Outcome.ADMITTED), (late, Outcome.ADMITTED)]
    admission.leave(waiting[0], now_s=2.0)
    assert outcomes(admission.decide(2.0)) == [(waiting[1], Outcome.ADMITTED)]


def test_nobody_overtakes_the_head_of_the_line() -> None:
    admission = make(100, share=1.0)
    first = enter(admission, "a", 50)
    big, small = enter(admission, "b", 90), enter(admission, "c", 10)
    assert outcomes(admission.decide(0.0)) == [(first, Outcome.ADMITTED)]
    admission.leave(big, now_s=1.0)  # it has given up
    assert outcomes(admission.decide(1.0)) == [(small, Outcome.ADMITTED)]


def test_a_refusal_says_how_long_the_line_takes() -> None:
    admission = make(100, share=1.0)
    (first,) = [enter(admission, "a", 100)]
    admission.decide(0.0)
    late = enter(admission, "b", 50, now_s=1.0, wait_s=10.0)
    assert admission.next_time_s(1.0) == 11.0
    (verdict,) = admission.decide(11.0)
    assert (verdict.account, verdict.outcome, verdict.retry_after_s) == (late, Outcome.REFUSED, 2.0)
    admission.leave(first, now_s=12.0)
    for second in range(12, 42):  # ten tokens become free each second
        admission.leave(enter(admission, "a", 10, now_s=second), now_s=second)
        account = enter(admission, "a", 10, now_s=second)
        admission.decide(second)
        admission.leave(account, now_s=second)
    enter(admission, "a", 100, now_s=42)
    admission.decide(42)
    enter(admission, "b", 60, now_s=42, wait_s=1.0)
    enter(admission, "c", 100, now_s=42, wait_s=1.0)
    one, two = admission.decide(43.0)
    assert one.retry_after_s is not None
    assert two.retry_after_s is not None
    assert 3 < one.retry_after_s < 9
    assert one.retry_after_s < two.retry_after_s < 15
    assert MIN_RETRY_S <= admission.retry_after_s(10**9, 43.0) == MAX_RETRY_S


def test_a_step_without_room_waits_and_changes_nothing_when_it_is_refused() -> None:
    admission = make(100)
    one, two = enter(admission, "a", 100), enter(admission, "b", 100)
    admission.decide(0.0)
    assert grow(admission, one, 60) == [(one, Outcome.GROWN)]
    assert grow(admission, two, 40) == [(two, Outcome.GROWN)]
    admission.grow(two, 41, now_s=0.0, deadline_s=5.0)
    assert admission.decide(1.0) == []
    assert outcomes(admission.decide(5.0)) == [(two, Outcome.REFUSED)]
    assert (two.held, two.wanted, admission.num_admitted) == (40, None, 2)
    admission.grow(two, 41, now_s=6.0, deadline_s=FOREVER_S)
    admission.leave(one, now_s=7.0)
    assert outcomes(admission.decide(7.0)) == [(two, Outcome.GROWN)]


def test_what_was_promised_is_taken_back_from_the_youngest_who_borrowed_it() -> None:
    admission = make(100)
    old, young, promised = (enter(admission, peer_id, 80) for peer_id in "abc")
    admission.decide(0.0)
    grow(admission, old, 40)
    grow(admission, young, 60)
    assert grow(admission, promised, 20) == [(young, Outcome.EVICTED), (promised, Outcome.GROWN)]
    assert (old.held, admission.held, admission.num_evicted) == (40, 60, 1)


def test_nothing_is_taken_from_a_session_whose_step_is_under_way() -> None:
    admission = make(100)
    busy, promised = (enter(admission, peer_id, 100) for peer_id in "ab")
    admission.decide(0.0)
    admission.grow(busy, 100, now_s=0.0, deadline_s=FOREVER_S)
    assert outcomes(admission.decide(0.0)) == [(busy, Outcome.GROWN)]
    assert grow(admission, promised, 10) == []
    admission.settle(busy, 100)
    assert outcomes(admission.decide(0.0)) == [(busy, Outcome.EVICTED), (promised, Outcome.GROWN)]


def test_borrowers_that_wait_for_each_other_end_one_by_one() -> None:
    admission = make(100)
    accounts = [enter(admission, peer_id, 100) for peer_id in "abc"]
    admission.decide(0.0)
    for account in accounts:
        grow(admission, account, 33)
    for account in accounts:
        assert grow(admission, account, 50) == []
    assert admission.next_time_s(0.0) == PATIENCE_S
    told = outcomes(admission.decide(PATIENCE_S))
    assert told == [(accounts[2], Outcome.EVICTED), (accounts[0], Outcome.GROWN), (accounts[1], Outcome.GROWN)]


@settings(max_examples=200)
@given(
    st.integers(20, 200),
    st.lists(
        st.tuples(st.sampled_from("EGSLX"), st.integers(0, 7), st.integers(1, 100), st.floats(0, 3)),
        max_size=60,
    ),
)
def test_accounts_add_up_whatever_happens(total: int, events: list[tuple[str, int, int, float]]) -> None:
    admission = make(total, max_sessions=6)
    alive: list[Account] = []
    now_s = 0.0
    for event, which, amount, pause_s in events:
        now_s += pause_s
        account = alive[which % len(alive)] if alive else None
        if event == "E" or account is None:
            alive.append(enter(admission, "abc"[which % 3], min(amount, total), now_s, wait_s=4.0))
        elif event == "G" and account.is_admitted and not account.is_busy and account.wanted is None:
            admission.grow(account, min(amount, account.most), now_s=now_s, deadline_s=now_s + 4.0)
        elif event == "S" and account.is_busy:
            admission.settle(account, amount)
        elif event == "L":
            admission.leave(account, now_s=now_s)
        elif event == "X" and account.wanted is not None:
            admission.stop_waiting(account)
        for verdict in admission.decide(now_s):
            assert verdict.outcome is not Outcome.EVICTED or not verdict.account.is_busy
            if verdict.outcome is Outcome.REFUSED:
                assert verdict.account.deadline_s <= now_s
                assert verdict.retry_after_s is not None
                assert MIN_RETRY_S <= verdict.retry_after_s <= MAX_RETRY_S
        alive = [each for each in alive if not each.is_over]
        admitted = [each for each in alive if each.is_admitted]
        assert admission.held == sum(each.held for each in admitted) <= total
        assert sum(each.promised for each in admitted) <= total or len(admitted) == 1
        assert admission.num_admitted + admission.num_waiting == len(alive)
        assert admission.num_admitted <= 6
        for each in admitted:  # a promise is kept as soon as nobody who borrowed it is in the middle of a step
            if each.wanted is not None and each.wanted <= each.promised:
                assert any(other.is_busy and other.is_borrower for other in admitted)
        next_s = admission.next_time_s(now_s)
        assert next_s is None or next_s > now_s
    for account in alive:
        admission.leave(account, now_s=now_s)
    assert admission.decide(now_s) == []
    assert (admission.held, admission.committed, admission.num_waiting) == (0, 0, 0)


@settings(max_examples=50)
@given(st.integers(50, 200), st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=30))
def test_all_sessions_come_to_their_end(total: int, wishes: list[tuple[int, int]]) -> None:
    """Sessions that grow in steps up to all that they may need, and begin again when their cache is taken away."""
    admission = make(total)
    begin = [(number, min(most, total), step) for number, (most, step) in enumerate(wishes)]
    running: dict[Account, tuple[int, int, int]] = {}
    done: Counter[int] = Counter()
    now_s = 0.0
    while begin or running:
        now_s += 0.5
        assert now_s < 5000, "they wait for each other"
        for wish in begin:
            running[enter(admission, str(wish[0]), wish[1], now_s)] = wish
        begin = []
        for account, (number, most, step) in list(running.items()):
            if account.is_admitted and account.wanted is None:
                if account.held == most:
                    admission.leave(account, now_s=now_s)
                    del running[account]
                    done[number] += 1
                else:
                    admission.grow(account, min(most, account.held + step), now_s=now_s, deadline_s=FOREVER_S)
        for verdict in admission.decide(now_s):
            if verdict.outcome is Outcome.EVICTED:
                begin.append(running.pop(verdict.account))
            elif verdict.outcome is Outcome.GROWN:
                admission.settle(verdict.account, verdict.account.held)
    assert done == Counter(range(len(wishes)))
