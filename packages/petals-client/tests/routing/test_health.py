"""Penalties: at once, more when repeated, less with time."""

from __future__ import annotations

import pytest

from petals_client.routing.health import HALF_LIFE_S, MAX_PENALTY_S, PENALTY_S, HealthLedger
from petals_core.errors import InvalidRequestError, OverloadedError, PeerConnectionError
from petals_core.identity import PeerId

ONE, OTHER = PeerId(bytes(32)), PeerId(bytes([1] * 32))
FAILURE = PeerConnectionError("lost")


def test_a_failure_counts_at_once_and_decays() -> None:
    ledger = HealthLedger()
    ledger.record_failure(ONE, FAILURE, now_s=100.0)
    assert ledger.penalty_s(ONE, now_s=100.0) == PENALTY_S
    assert ledger.penalty_s(ONE, now_s=100.0 + HALF_LIFE_S) == pytest.approx(PENALTY_S / 2)
    assert ledger.penalty_s(ONE, now_s=100.0 + 30 * HALF_LIFE_S) == 0.0
    assert ledger.penalty_s(OTHER, now_s=100.0) == 0.0


def test_repetition_counts_more_up_to_a_limit() -> None:
    ledger = HealthLedger()
    penalties = []
    for _ in range(10):
        ledger.record_failure(ONE, FAILURE, now_s=0.0)
        penalties.append(ledger.penalty_s(ONE, now_s=0.0))
    assert penalties[1] > 2 * penalties[0]
    assert penalties[-1] == MAX_PENALTY_S


def test_success_forgives() -> None:
    ledger = HealthLedger()
    ledger.record_failure(ONE, FAILURE, now_s=0.0)
    ledger.record_success(ONE, now_s=0.0)
    assert ledger.penalty_s(ONE, now_s=0.0) == PENALTY_S / 2
    for _ in range(20):
        ledger.record_success(ONE, now_s=0.0)
    assert ledger.penalty_s(ONE, now_s=0.0) == 0.0


def test_whose_fault_it_is() -> None:
    ledger = HealthLedger()
    ledger.record_failure(ONE, InvalidRequestError("our own mistake"), now_s=0.0)
    assert ledger.penalty_s(ONE, now_s=0.0) == 0.0
    ledger.record_failure(ONE, OverloadedError("full", retry_after_s=2.0), now_s=0.0)
    assert ledger.penalty_s(ONE, now_s=0.0) == 2.0


def test_it_does_not_grow_without_bound() -> None:
    ledger = HealthLedger()
    for number in range(4200):
        ledger.record_failure(PeerId(number.to_bytes(32, "big")), FAILURE, now_s=number / 1000)
    assert ledger.penalty_s(PeerId((0).to_bytes(32, "big")), now_s=4.2) == 0.0
    assert ledger.penalty_s(PeerId((4199).to_bytes(32, "big")), now_s=4.2) > 0.0
