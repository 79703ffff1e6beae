"""Penalties: at once, more when repeated, less with time, gone with a success."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_client.routing.health import HALF_LIFE_S, MAX_PENALTY_S, PENALTY_S, SLOW_S, HealthLedger
from petals_core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    PeerConnectionError,
    PetalsError,
    SessionLengthError,
)
from petals_core.identity import PeerId

ONE, OTHER = PeerId(bytes(32)), PeerId(bytes([1] * 32))
FAILURE = PeerConnectionError("lost")


@pytest.mark.parametrize("error", [FAILURE, DeadlineExceededError("no answer")])
def test_a_failure_counts_at_once_and_decays(error: PetalsError) -> None:
    ledger = HealthLedger()
    ledger.record_failure(ONE, error, now_s=100.0)
    assert ledger.penalty_s(ONE, now_s=100.0) == PENALTY_S
    assert ledger.penalty_s(ONE, now_s=100.0 + HALF_LIFE_S) == pytest.approx(PENALTY_S / 2)
    assert ledger.penalty_s(ONE, now_s=100.0 + 30 * HALF_LIFE_S) == 0.0
    assert ledger.penalty_s(OTHER, now_s=100.0) == 0.0


def test_repetition_doubles_up_to_a_limit() -> None:
    ledger = HealthLedger()
    penalties = []
    for _ in range(10):
        ledger.record_failure(ONE, FAILURE, now_s=0.0)
        penalties.append(ledger.penalty_s(ONE, now_s=0.0))
    assert penalties[:4] == [PENALTY_S, 2 * PENALTY_S, 4 * PENALTY_S, 8 * PENALTY_S]
    assert penalties[-1] == MAX_PENALTY_S


def test_a_failure_after_a_long_time_counts_as_a_first_one() -> None:
    ledger = HealthLedger()
    for now_s in (0.0, 40 * HALF_LIFE_S):
        ledger.record_failure(ONE, FAILURE, now_s=now_s)
        assert ledger.penalty_s(ONE, now_s=now_s) == PENALTY_S


def test_a_success_clears() -> None:
    ledger = HealthLedger()
    for _ in range(5):
        ledger.record_failure(ONE, FAILURE, now_s=0.0)
    ledger.record_success(ONE, now_s=0.0)
    assert ledger.penalty_s(ONE, now_s=0.0) == 0.0
    ledger.record_failure(ONE, FAILURE, now_s=0.0)
    assert ledger.penalty_s(ONE, now_s=0.0) == PENALTY_S


@pytest.mark.parametrize("error", [InvalidRequestError("our own mistake"), SessionLengthError("too long")])
def test_errors_of_the_request_blame_nobody(error: PetalsError) -> None:
    ledger = HealthLedger()
    ledger.record_failure(ONE, error, now_s=0.0)
    assert ledger.penalty_s(ONE, now_s=0.0) == 0.0


def test_a_full_server_is_worth_its_waiting_time() -> None:
    ledger = HealthLedger()
    for _ in range(5):
        ledger.record_failure(ONE, OverloadedError("full", retry_after_s=2.0), now_s=0.0)
        assert ledger.penalty_s(ONE, now_s=0.0) == 2.0
    ledger.record_failure(ONE, FAILURE, now_s=0.0)
    assert ledger.penalty_s(ONE, now_s=0.0) == PENALTY_S


def test_slow_answers_count_until_one_comes_in_time() -> None:
    ledger = HealthLedger()
    ledger.record_success(ONE, now_s=0.0, took_s=0.5 * SLOW_S, expected_s=0.001)  # a stall
    assert ledger.penalty_s(ONE, now_s=0.0) == 0.0
    ledger.record_success(ONE, now_s=0.0, took_s=4.0, expected_s=2.0)  # within what is usual
    assert ledger.penalty_s(ONE, now_s=0.0) == 0.0
    ledger.record_success(ONE, now_s=0.0, took_s=2.0, expected_s=0.1)
    assert ledger.penalty_s(ONE, now_s=0.0) == 0.0  # it may have been a moment's trouble
    ledger.record_success(ONE, now_s=0.0, took_s=2.0, expected_s=0.1)
    assert ledger.penalty_s(ONE, now_s=0.0) == pytest.approx(1.9)
    record = ledger.record(ONE)
    assert record is not None
    assert record.reason == "an answer took 2 s instead of 0.1 s"
    ledger.record_success(ONE, now_s=0.0, took_s=0.1, expected_s=0.1)
    assert ledger.penalty_s(ONE, now_s=0.0) == 0.0


@given(st.lists(st.tuples(st.sampled_from(["fail", "full", "slow", "own", "good"]), st.floats(0, 300)), max_size=30))
def test_penalties_are_bounded_and_never_grow_by_themselves(events: list[tuple[str, float]]) -> None:
    ledger, now_s = HealthLedger(), 0.0
    for kind, pause_s in events:
        before = ledger.penalty_s(ONE, now_s=now_s)
        now_s += pause_s
        assert ledger.penalty_s(ONE, now_s=now_s) <= before
        match kind:
            case "fail":
                ledger.record_failure(ONE, FAILURE, now_s=now_s)
                assert PENALTY_S <= ledger.penalty_s(ONE, now_s=now_s) <= MAX_PENALTY_S
            case "full":
                ledger.record_failure(ONE, OverloadedError("full", retry_after_s=1e9), now_s=now_s)
            case "slow":
                for _ in range(2):
                    ledger.record_success(ONE, now_s=now_s, took_s=1e9, expected_s=0.1)
                assert ledger.penalty_s(ONE, now_s=now_s) == PENALTY_S
            case "own":
                before = ledger.penalty_s(ONE, now_s=now_s)
                ledger.record_failure(ONE, InvalidRequestError("mine"), now_s=now_s)
                assert ledger.penalty_s(ONE, now_s=now_s) == before
            case _:
                ledger.record_success(ONE, now_s=now_s)
                assert ledger.penalty_s(ONE, now_s=now_s) == 0.0


def test_it_does_not_grow_without_bound() -> None:
    ledger = HealthLedger()
    for number in range(4200):
        ledger.record_failure(PeerId(number.to_bytes(32, "big")), FAILURE, now_s=number / 1000)
    assert ledger.penalty_s(PeerId((0).to_bytes(32, "big")), now_s=4.2) == 0.0
    assert ledger.penalty_s(PeerId((4199).to_bytes(32, "big")), now_s=4.2) > 0.0
