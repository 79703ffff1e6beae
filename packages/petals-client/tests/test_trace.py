"""Where the time of a trip went."""

from __future__ import annotations

import pytest

from petals_client.trace import StepTrace, format_trace, trace_trip
from petals_core.identity import PeerId
from petals_core.routing.graph import Hop

CHAIN = tuple(Hop(peer_id=PeerId(bytes([n]) * 32), start=n, end=n + 1) for n in range(3))
TIMINGS = [(1000, 5000, 10_000), (0, 6000, 40_000), (2000, 7000, 0)]


def test_all_of_the_time_is_told() -> None:
    hops = trace_trip(CHAIN, TIMINGS, round_trips_s=[0.02, 0.03, 0.04], carried=[False, False, False], total_s=0.121)
    assert sum(hop.queue_s + hop.compute_s + hop.network_s for hop in hops) == pytest.approx(0.121)
    # 10 ms to the first, 10 to the second, 40 to the third and 20 back: of 100 ms beside the servers'.
    assert [hop.network_s for hop in hops] == pytest.approx([0.0125, 0.0125, 0.075])


def test_states_that_the_client_carries() -> None:
    hops = trace_trip(CHAIN, TIMINGS, round_trips_s=[0.02, 0.03, 0.04], carried=[False, True, False], total_s=0.121)
    assert [hop.is_carried for hop in hops] == [False, True, False]
    # 10 ms, then 10 + 15 by way of the client, 40, and 20 back.
    assert hops[1].network_s == pytest.approx(0.1 * 25 / 95)
    table = format_trace([StepTrace(num_tokens=1, total_s=0.121, hops=hops)])
    assert table.count("(carried by this client)") == 1


def test_a_server_that_lies_costs_nothing_but_the_trace() -> None:
    assert trace_trip(CHAIN, TIMINGS[:2], round_trips_s=[0, 0, 0], carried=[False] * 3, total_s=1.0) == ()
    hops = trace_trip(CHAIN, [(1 << 40, 0, 0)] * 3, round_trips_s=[0, 0, 0], carried=[False] * 3, total_s=1.0)
    assert [hop.network_s for hop in hops] == [0.0, 0.0, 0.0]
