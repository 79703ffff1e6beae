from __future__ import annotations

from collections.abc import Callable

from petals_dht.monitor.observations import Observations, Probe
from petals_dht.monitor.view import SwarmView, arrange, find_outdated, matches, view_swarm
from petals_dht.overview import ModelSummary
from petals_dht.testing import FINGERPRINT, make_announcement, make_info

NOW_S = 1_800_000_000.0
See = Callable[..., SwarmView]


def server(name: str, start: int, end: int, **fields: object) -> object:
    return make_announcement(now_s=NOW_S, start=start, end=end, public_name=name, **fields)


def test_blocks_of_silent_servers_are_dark(see: See) -> None:
    view = see(server("a", 0, 8), server("b", 6, 12), failures={"b": "connection refused"})
    (model,) = view.models
    assert model.coverage == (1,) * 8 + (0,) * 4
    assert model.dark == ((8, 12),)
    assert model.single == ((0, 8),)
    assert model.route is None
    assert [alert.text for alert in model.alerts] == [
        "dark: nobody serves blocks 8:12",
        "b announces itself and does not answer (connection refused)",
        "held by one server only: blocks 0:8",
    ]
    assert [alert.is_bad for alert in model.alerts] == [True, False, False]
    assert {each.name: each.state for each in model.servers} == {"a": "online", "b": "silent"}


def test_what_has_expired_since_is_gone(see: See) -> None:
    view = see(server("a", 0, 12), server("b", 0, 12, expires_at_s=NOW_S + 0.5))
    assert [each.name for each in view.models[0].servers] == ["a"]
    assert view.models[0].coverage == (1,) * 12


def test_the_route_is_the_one_that_a_client_takes(see: See) -> None:
    view = see(
        server("slow", 0, 12, inference_tokens_per_s=1.0),
        server("left", 0, 6, inference_tokens_per_s=100.0),
        server("right", 4, 12, inference_tokens_per_s=100.0),
    )
    route = view.models[0].route
    assert route is not None
    # "left" has fewer blocks for its rate, so its blocks are dearer.
    assert [(hop.title, hop.start, hop.end) for hop in route.hops] == [("left", 0, 4), ("right", 4, 12)]
    assert 0.04 < route.step_s < 0.1


def test_outdated_versions(see: See) -> None:
    versions = ["0.10.0", "0.9.9", "0.10.0", "", "unknown"]
    (model,) = see(*(server(f"s{number}", 0, 12, version=each) for number, each in enumerate(versions))).models
    outdated, newest = find_outdated(model.servers)
    assert ([each.name for each in outdated], newest) == (["s1"], "0.10.0")
    assert any(alert.text == "s1 runs an older version than 0.10.0" for alert in model.alerts)
    assert find_outdated([]) == ([], "")


def test_a_server_that_serves_something_else_is_told() -> None:
    signed = make_announcement(now_s=NOW_S, start=0, end=12, public_name="a")
    model = ModelSummary("test-model", FINGERPRINT, 12, NOW_S + 1000)
    observations = Observations(opened_at_s=0.0)
    observations.note_models([model], at_s=0.0)
    observations.note_servers(model, [signed], at_s=0.0)
    info = make_info(signed, start=2, end=5)
    observations.note_probe(signed.peer_id, Probe(at_s=0.0, round_trip_s=0.1, state="online", info=info))
    (view,) = view_swarm(observations, at_s=0.0, now_s=NOW_S).models
    assert not view.servers[0].is_confirmed
    assert view.alerts[0].text == "a: not what is announced (answers for blocks 2:5)"


def test_orders(see: See) -> None:
    (model,) = see(
        server("b", 4, 8, inference_tokens_per_s=5.0, cache_tokens_left=7, version="0.2"),
        server("A", 0, 4, inference_tokens_per_s=50.0, cache_tokens_left=70, load=2.0),
        server("c", 8, 12, state="draining", load=1.0),
    ).models

    def names(sort: str, *, is_reversed: bool = False) -> str:
        return "".join(each.name for each in arrange(model.servers, sort=sort, is_reversed=is_reversed))

    assert names("blocks") == "Abc"
    assert names("blocks", is_reversed=True) == "cbA"
    assert names("name") == "Abc"
    assert names("speed") == "Abc"
    assert names("speed", is_reversed=True) == "bAc", "who tells no speed comes last either way"
    assert names("load") == "Acb"
    assert names("state")[0] == "c"
    assert names("cache") == "bAc"


def test_filters(see: See) -> None:
    (model,) = see(
        server("Attic", 0, 4, adapters=("poems",), version="0.2.0"),
        server("lab", 2, 12, state="draining", quantization="int8"),
    ).models
    attic, lab = model.servers
    for wanted in ("", "attic", "POEMS", "0.2", "online float32", "1", str(attic.peer_id)[:9]):
        assert matches(attic, wanted), wanted
    for wanted in ("lab", "poems int8", "4", "11"):
        assert not matches(attic, wanted), wanted
    assert matches(lab, "drain int8 11")


def test_many_names_are_cut_short(see: See) -> None:
    servers = [server(f"s{number}", 0, 12) for number in range(6)]
    (model,) = see(*servers, failures={f"s{number}": "no answer" for number in range(5)}).models
    text = next(alert.text for alert in model.alerts if "answer" in alert.text)
    assert text.endswith("and 2 more announce themselves and do not answer")
