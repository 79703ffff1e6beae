from __future__ import annotations

import json
import re
from collections.abc import Callable

from petals_dht.monitor.exports import to_json, to_prometheus
from petals_dht.monitor.view import SwarmView
from petals_dht.testing import make_announcement

NOW_S = 1_800_000_000.0
See = Callable[..., SwarmView]
SAMPLE = re.compile(r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\]|\\["\\n])*",?)*)\} (-?[0-9.e+-]+)')


def swarm(see: See) -> SwarmView:
    return see(
        make_announcement(
            now_s=NOW_S, start=0, end=8, public_name='a "quoted\\" name', inference_tokens_per_s=41.5, load=0.5
        ),
        make_announcement(now_s=NOW_S, start=6, end=12, public_name="lab"),
        failures={"lab": "no answer"},
    )


def test_json(see: See) -> None:
    (model,) = json.loads(json.dumps(to_json(swarm(see))))["models"]
    assert model["name"] == "test-model"
    assert model["coverage"] == [1] * 8 + [0] * 4
    assert model["dark"] == [[8, 12]]
    assert model["route"] is None
    assert [server["state"] for server in model["servers"]] == ["online", "silent"]
    assert model["servers"][0]["tokens_per_s"] == 41.5
    assert model["alerts"][0] == {"is_bad": True, "text": "dark: nobody serves blocks 8:12"}


def test_prometheus(see: See) -> None:
    text = to_prometheus(swarm(see))
    values: dict[str, list[float]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            values.setdefault(match[1], []).append(float(match[3]))
    assert values["petals_model_dark_blocks"] == [4]
    assert values["petals_block_servers"] == [1] * 8 + [0] * 4
    assert values["petals_server_up"] == [1, 0]
    assert values["petals_server_tokens_per_second"] == [41.5]
    assert values["petals_server_delay_seconds"] == [0.02]
    assert 'name="a \\"quoted\\\\\\" name"' in text
    for name in values:
        assert text.count(f"# TYPE {name} gauge\n") == 1


def test_who_was_not_asked_is_neither_up_nor_down(see: See) -> None:
    text = to_prometheus(see(make_announcement(now_s=NOW_S), answered=False))
    assert "petals_server_up" not in text
