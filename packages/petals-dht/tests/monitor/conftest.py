from __future__ import annotations

from collections.abc import Callable

import pytest

from petals_core.announcement import SignedAnnouncement
from petals_dht.monitor.observations import Observations, Probe
from petals_dht.monitor.view import SwarmView, view_swarm
from petals_dht.overview import ModelSummary
from petals_dht.testing import FINGERPRINT, make_info

NOW_S = 1_800_000_000.0
See = Callable[..., SwarmView]


@pytest.fixture
def see() -> See:
    """The view of servers of one model that were looked up once; all answer, but those whose failure is given."""

    def see_(*servers: SignedAnnouncement, failures: dict[str, str] | None = None, answered: bool = True) -> SwarmView:
        model = ModelSummary("test-model", FINGERPRINT, 12, NOW_S + 1000)
        observations = Observations(opened_at_s=0.0)
        observations.note_models([model], at_s=0.0)
        for signed in servers:
            failure = (failures or {}).get(signed.announcement.public_name, "")
            if failure:
                observations.note_probe(signed.peer_id, Probe(at_s=0.0, failure=failure))
            elif answered:
                info = make_info(signed)
                probe = Probe(at_s=0.0, round_trip_s=0.02, state=info.state, info=info)
                observations.note_probe(signed.peer_id, probe)
        observations.note_servers(model, servers, at_s=0.0)
        return view_swarm(observations, at_s=1.0, now_s=NOW_S + 1)

    return see_
