"""What makes a server dear."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from petals_core.announcement import Announcement
from petals_core.identity import PeerId
from petals_core.next_delays import NextDelays
from petals_core.routing.cost import FULL_CACHE_S, SOFTWARE_S, UNKNOWN_DELAY_S, estimate_cost
from petals_core.routing.graph import Server
from petals_core.routing.planner import plan_chain

CLAIMS = frozenset({"inference_tokens_per_s", "forward_tokens_per_s", "load", "cache_tokens_left", "next_delays"})


def estimate(number: int = 0, **changes: Any) -> Server:
    claims = {name: value for name, value in changes.items() if name in CLAIMS}
    measured = {name: value for name, value in changes.items() if name not in CLAIMS}
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
        announcement, PeerId(bytes([number]) * 32), **{"round_trip_s": 0.01, "penalty_s": 0.0, **measured}
    )


def test_what_adds_to_a_visit() -> None:
    plain = estimate()
    assert (plain.start, plain.end) == (2, 6)
    assert (plain.client_s, plain.hop_s) == (0.005, SOFTWARE_S)
    assert estimate(round_trip_s=None).client_s == UNKNOWN_DELAY_S
    assert estimate(penalty_s=5.0).hop_s == plain.hop_s + 5.0
    next_delays = NextDelays.of([(bytes(32), 0.02)])
    assert estimate(next_delays=next_delays).next_delays == next_delays


def test_a_cache_without_room() -> None:
    assert estimate(cache_tokens=100, cache_tokens_left=99).hop_s == SOFTWARE_S + FULL_CACHE_S
    assert estimate(cache_tokens=100, cache_tokens_left=100).hop_s == SOFTWARE_S


def test_what_adds_to_a_block() -> None:
    assert estimate(inference_tokens_per_s=100.0).block_s == pytest.approx(0.01 / 4)
    assert estimate(inference_tokens_per_s=100.0, load=3.0).block_s == pytest.approx(0.04 / 4)
    assert estimate(inference_tokens_per_s=100.0, num_sessions=10).block_s == pytest.approx(0.03 / 4)
    assert estimate(inference_tokens_per_s=100.0, load=1.0, num_sessions=10).block_s == pytest.approx(0.03 / 4)


def test_batches_have_a_rate_of_their_own() -> None:
    server = estimate(inference_tokens_per_s=10.0, forward_tokens_per_s=1000.0, batch_tokens=500)
    assert server.block_s == pytest.approx(0.5 / 4)


def test_absurd_claims_stay_finite() -> None:
    assert estimate(inference_tokens_per_s=0.0, load=1e6).block_s < 1e6
    assert estimate(round_trip_s=0.0, inference_tokens_per_s=1e12).block_s > 0.0


def test_noise_decides_between_equals_only() -> None:
    slow, fast = estimate(inference_tokens_per_s=60.0), estimate(inference_tokens_per_s=100.0, noise=1.0)
    span_s = [server.hop_s + 2 * server.client_s + 4 * server.block_s for server in (fast, slow)]
    assert span_s[0] < span_s[1]
    assert estimate(noise=0.5).hop_s > estimate().hop_s


@pytest.mark.parametrize("seed", range(10))
def test_sixty_clients_share_three_equal_servers(seed: int) -> None:
    """Each plans for itself, with what the servers say when it comes: the last five may still be on their way."""
    rng = random.Random(seed)
    chosen: list[int] = []
    for _ in range(60):
        seen = Counter(chosen[: max(0, len(chosen) - rng.randint(0, 5))])
        servers = [
            estimate(
                number,
                round_trip_s=0.01 * rng.uniform(0.95, 1.05),
                inference_tokens_per_s=100.0 * rng.uniform(0.97, 1.03),
                num_sessions=seen[number],
                noise=rng.random(),
            )
            for number in range(3)
        ]
        rng.shuffle(servers)
        (hop,) = plan_chain(servers, 2, 6, model_name="tiny")
        chosen.append(hop.peer_id.digest[0])
    assert max(Counter(chosen).values()) <= 1.25 * 60 / 3
