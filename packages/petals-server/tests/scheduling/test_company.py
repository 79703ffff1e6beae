"""Whom the device waits for because they shared the last turn with those that are here."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_server.scheduling.company import Company

MOST_S = 0.006


def shared(*sessions: str) -> Company:
    company = Company()
    for session in sessions:
        company.note_arrival(session, 0.0)
    company.note_turn(sessions)
    return company


def test_who_shared_a_turn_is_waited_for_a_moment_after_the_latest_arrival() -> None:
    company = shared("a", "b", "c")
    assert company.wait_until({"stranger"}, MOST_S) is None
    company.note_arrival("a", 1.0)
    assert company.wait_until({"a"}, MOST_S) == 1.0 + MOST_S
    company.note_arrival("b", 1.004)
    assert company.wait_until({"a", "b"}, MOST_S) == 1.004 + MOST_S
    company.note_arrival("b", 1.008)
    assert company.wait_until({"a", "b"}, MOST_S) == 1.0 + 2 * MOST_S, "the first one waits no longer than that"
    company.note_arrival("c", 1.009)
    assert company.wait_until({"a", "b", "c"}, MOST_S) is None
    assert company.wait_until({"a", "b", "c", "stranger"}, MOST_S) is None


def test_who_was_waited_for_in_vain_is_left_behind_and_waits_for_nobody() -> None:
    company = shared("a", "b")
    company.note_arrival("a", 1.0)
    company.note_turn(["a"])
    company.note_arrival("b", 1.1)
    assert company.wait_until({"b"}, MOST_S) is None
    company.note_turn(["b"])
    company.note_arrival("a", 2.0)
    assert company.wait_until({"a"}, MOST_S) is None


def test_who_comes_late_again_and_again_is_waited_for_ever_less_often() -> None:
    company = shared("a", "b")
    waited = []
    for number in range(200):  # they meet now and then, but b takes longer on its way
        company.note_arrival("a", float(number))
        waited.append(company.wait_until({"a"}, MOST_S) is not None)
        company.note_turn(["a"])
        company.note_arrival("b", number + 0.5)
        company.note_arrival("a", number + 0.5)
        company.note_turn(["a", "b"])
    assert waited[0]
    assert sum(waited) < 10


def test_who_keeps_company_is_trusted_again() -> None:
    company = shared("a", "b")
    company.note_turn(["a"])
    for _ in range(4):
        company.note_turn(["a", "b"])
    company.note_arrival("a", 1.0)
    assert company.wait_until({"a"}, MOST_S) == 1.0 + MOST_S


def test_who_has_gone_is_not_waited_for() -> None:
    company = shared("a", "b")
    company.forget("b")
    company.note_arrival("a", 1.0)
    assert company.wait_until({"a"}, MOST_S) is None


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["arrive", "turn", "forget"])), max_size=60))
def test_nobody_waits_longer_than_twice_a_moment(events: list[tuple[str, str]]) -> None:
    company = Company()
    present: dict[str, float] = {}
    for number, (session, event) in enumerate(events):
        if event == "arrive":
            company.note_arrival(session, float(number))
            present[session] = float(number)
        elif event == "turn":
            company.note_turn(list(present))
            present.clear()
        else:
            company.forget(session)
            present.pop(session, None)
        until_s = company.wait_until(set(present), MOST_S)
        if until_s is not None:
            assert min(present.values()) < until_s <= max(present.values()) + MOST_S
