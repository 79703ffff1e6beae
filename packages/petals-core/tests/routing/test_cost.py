"""What makes a server dear."""

from __future__ import annotations

from typing import Any

from petals_core.announcement import Announcement
from petals_core.identity import PeerId
from petals_core.routing.cost import UNKNOWN_ROUND_TRIP_S, estimate_cost
from petals_core.routing.graph import Server


def estimate(round_trip_s: float | None = 0.01, penalty_s: float = 0.0, tokens: int = 0, **claims: Any) -> Server:
    announcement = Announcement(
        model_name="tiny",
        fingerprint="f",
        num_blocks=8,
        start=2,
        end=6,
        addresses=(),
        state="online",
        torch_dtype="float32",
        issued_at_s=0.0,
        expires_at_s=100.0,
        **claims,
    )
    return estimate_cost(
        announcement, PeerId(bytes(32)), round_trip_s=round_trip_s, penalty_s=penalty_s, cache_tokens=tokens
    )


def test_what_adds_to_a_visit() -> None:
    plain = estimate()
    assert (plain.start, plain.end) == (2, 6)
    assert estimate(round_trip_s=0.2).hop_s > plain.hop_s
    assert estimate(penalty_s=5.0).hop_s == plain.hop_s + 5.0
    assert estimate(tokens=100, cache_tokens_left=99).hop_s > estimate(tokens=100, cache_tokens_left=100).hop_s


def test_what_adds_to_a_block() -> None:
    assert estimate(inference_tokens_per_s=10.0).block_s > estimate(inference_tokens_per_s=100.0).block_s
    assert estimate(load=3.0).block_s > estimate().block_s


def test_nearly_equal_is_equal_and_never_cheaper_than_measured() -> None:
    assert estimate(round_trip_s=0.0101).hop_s == estimate(round_trip_s=0.0110).hop_s
    assert estimate(round_trip_s=None).hop_s >= UNKNOWN_ROUND_TRIP_S


def test_absurd_claims_stay_finite() -> None:
    assert estimate(inference_tokens_per_s=0.0, load=1e6).block_s < 1e6
    assert estimate(round_trip_s=0.0, inference_tokens_per_s=1e12).block_s > 0.0
