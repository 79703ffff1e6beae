from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.announcement import OBSERVED_ID_BYTES
from petals_core.identity import PeerId
from petals_core.observation import MIN_REQUESTS, SLACK_S, WINDOW, Observations, unexplained_s

SERVER = PeerId(bytes(range(32)))
times = st.floats(0.001, 10.0)


@given(st.lists(times, min_size=1, max_size=3 * WINDOW), times)
def test_the_best_of_the_last_requests_counts(took: list[float], expected_s: float) -> None:
    observations = Observations()
    for took_s in took:
        observations.note(SERVER, expected_s=expected_s, took_s=took_s)
    if len(took) < MIN_REQUESTS:
        assert observations.percents() == ()
        return
    ((beginning, percent),) = observations.percents()
    assert beginning == SERVER.digest[:OBSERVED_ID_BYTES]
    best = min(1.0, (expected_s + SLACK_S) / min(took[-WINDOW:]))
    assert percent == pytest.approx(100 * best, abs=0.51)


def test_servers_seen_longest_ago_are_forgotten() -> None:
    observations = Observations()
    servers = [PeerId(os.urandom(32)) for _ in range(100)]
    for _ in range(MIN_REQUESTS):
        observations.note(servers[0], expected_s=0.1, took_s=0.1)
    for server in servers:
        for _ in range(MIN_REQUESTS):
            observations.note(server, expected_s=0.1, took_s=0.4)
    named = [beginning for beginning, _ in observations.percents()]
    assert named == [server.digest[:OBSERVED_ID_BYTES] for server in servers[-64:]]


def test_a_server_that_says_too_little_of_its_time_is_seen() -> None:
    # It announces 100 tokens/s, takes 100 ms and says 10 ms, 40 ms away.
    observations = Observations()
    for _ in range(MIN_REQUESTS):
        lost_s = unexplained_s(network_s=0.140 - 0.010, round_trips_s=0.040)
        observations.note(SERVER, expected_s=0.010, took_s=0.010 + lost_s)
    assert observations.percents()[0][1] < 20


@given(st.lists(times, min_size=1, max_size=8))
def test_distance_is_no_fault(round_trips: list[float]) -> None:
    assert unexplained_s(network_s=sum(round_trips), round_trips_s=sum(round_trips)) == 0.0
