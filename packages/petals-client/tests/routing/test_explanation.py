"""What is said about a chain adds up, and the reasons name what decided."""

from __future__ import annotations

import json
from typing import Any

import pytest

from petals_client.routing.explanation import Facts, Route, explain_chain
from petals_core.identity import PeerId
from petals_core.next_delays import NextDelays
from petals_core.routing.cost import FULL_CACHE_S, SOFTWARE_S
from petals_core.routing.graph import Server
from petals_core.routing.planner import plan_chain


def peer(number: int) -> PeerId:
    return PeerId(bytes([number]) * 32)


def server(number: int, start: int, end: int, **changes: Any) -> Server:
    costs: dict[str, Any] = {"client_s": 0.02, "hop_s": SOFTWARE_S, "block_s": 0.001, **changes}
    return Server(peer_id=peer(number), start=start, end=end, **costs)


def facts(**changes: Any) -> Facts:
    known: dict[str, Any] = {
        "public_name": "",
        "is_measured": True,
        "penalty_s": 0.0,
        "penalty_reason": None,
        "cache_tokens_left": None,
        "excluded_by": None,
    }
    return Facts(**{**known, **changes})


def explain(servers: list[Server], known: dict[int, Facts] | None = None, cache_tokens: int = 0) -> Route:
    known = known or {}
    return explain_chain(
        plan_chain(servers, 0, 6, model_name="tiny"),
        [each for each in servers if (known.get(each.peer_id.digest[0]) or facts()).excluded_by is None],
        {each.peer_id: known.get(each.peer_id.digest[0], facts()) for each in servers},
        {each.peer_id: (each.start, each.end) for each in servers},
        model_name="tiny",
        start=0,
        end=6,
        cache_tokens=cache_tokens,
    )


def test_edges_add_up_to_the_cost_of_the_chain() -> None:
    route = explain(
        [
            server(1, 0, 3, next_delays=NextDelays.of([(peer(2).digest, 0.005)])),
            server(2, 3, 5, hop_s=SOFTWARE_S + 0.003),
            server(3, 5, 6, hop_s=SOFTWARE_S + 2.0 + FULL_CACHE_S),
        ],
        {3: facts(penalty_s=2.0, penalty_reason="lost", cache_tokens_left=9, is_measured=False)},
        cache_tokens=10,
    )
    assert [edge.delay_is for edge in route.edges] == ["measured", "announced", "by the client", "assumed"]
    assert [edge.delay_s for edge in route.edges] == pytest.approx([0.02, 0.005, 0.04, 0.02])
    assert sum(edge.total_s for edge in route.edges) == pytest.approx(route.total_s)
    assert route.edges[1].chance_s == pytest.approx(0.003)
    assert (route.edges[2].penalty_s, route.edges[2].cache_s) == (2.0, FULL_CACHE_S)
    assert [edge.target for edge in route.edges] == [peer(1), peer(2), peer(3), None]
    assert not route.alternatives


@pytest.mark.parametrize(
    ("other", "known", "reason"),
    [
        ({"hop_s": SOFTWARE_S + 20.0}, facts(penalty_s=20.0, penalty_reason="no answer"), "penalty of 20 s: no answer"),
        ({"hop_s": SOFTWARE_S + FULL_CACHE_S}, facts(cache_tokens_left=5), "no room in its cache: 5 tokens left of 10"),
        ({"block_s": 0.01}, facts(), "slower: 54 ms more for its 6 blocks"),
        ({"client_s": 0.1}, facts(), "farther: 80 ms more to the client"),
        ({"client_s": 0.1}, facts(is_measured=False), "are assumed: it was not measured"),
        ({"hop_s": SOFTWARE_S + 0.001}, facts(), "as good: chance decided"),
        ({}, facts(excluded_by="nf4 weights"), "not allowed: nf4 weights"),
        ({"start": 2}, facts(), "its span does not fit"),
    ],
)
def test_why_another_lost(other: dict[str, Any], known: Facts, reason: str) -> None:
    span = {"start": 0, "end": 6}
    route = explain([server(1, 0, 6), server(2, **{**span, **other})], {2: known}, cache_tokens=10)
    assert route.chain[0].peer_id == peer(1)
    (lost,) = route.alternatives
    assert reason in lost.reason
    assert (lost.extra_s is None) == (known.excluded_by is not None)


def test_texts() -> None:
    route = explain([server(1, 0, 6), server(2, 0, 6, block_s=0.01)], {1: facts(public_name="lab")})
    text = str(route)
    assert f"{peer(1).short} lab" in text
    assert "slower" in text
    found = json.loads(json.dumps(route.to_json()))
    assert [edge["to"] for edge in found["edges"]] == [str(peer(1)), "client"]
    assert found["total_s"] == pytest.approx(sum(edge["total_s"] for edge in found["edges"]))
