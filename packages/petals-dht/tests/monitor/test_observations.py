from __future__ import annotations

from petals_core.announcement import SignedAnnouncement
from petals_core.identity import Identity
from petals_dht.monitor.observations import Observations, Probe, speed_bound
from petals_dht.overview import ModelSummary
from petals_dht.testing import FINGERPRINT, make_announcement, make_info

MODEL = ModelSummary("test-model", FINGERPRINT, 12, 2e9)


def test_the_weakest_block_bounds_the_speed() -> None:
    def server(start: int, end: int, speed: float | None) -> SignedAnnouncement:
        return make_announcement(start=start, end=end, inference_tokens_per_s=speed)

    assert speed_bound([server(0, 12, 10.0), server(4, 8, 5.0)], 12) == 10.0
    assert speed_bound([server(0, 8, 10.0), server(8, 12, 4.0), server(8, 12, 5.0)], 12) == 9.0
    assert speed_bound([server(0, 11, 10.0)], 12) == 0.0
    assert speed_bound([server(0, 12, None)], 12) is None
    assert speed_bound([server(0, 12, None), server(0, 12, 3.0)], 12) is None
    assert speed_bound([], 12) == 0.0


def test_what_a_server_gives_is_summed_up_while_it_is_there() -> None:
    identity = Identity.ephemeral()
    observations = Observations(opened_at_s=0.0)
    observations.note_models([MODEL], at_s=0.0)

    def look(at_s: float, state: str = "online") -> None:
        observations.note_servers(MODEL, [make_announcement(identity, start=0, end=4, state=state)], at_s=at_s)

    look(0.0)
    signed = make_announcement(identity, start=0, end=4)
    observations.note_probe(
        identity.peer_id, Probe(at_s=0.0, round_trip_s=0.1, state="online", info=make_info(signed, num_sessions=3))
    )
    look(10.0)
    history = observations.history(FINGERPRINT, identity.peer_id)
    assert history is not None
    assert (history.block_s, history.session_s) == (40.0, 30.0)
    look(20.0, state="draining")
    assert (history.block_s, history.session_s) == (40.0, 30.0)
    look(1000.0)
    assert history.block_s == 40.0, "nobody saw what happened in so long a pause"
    observations.note_probe(identity.peer_id, Probe(at_s=1000.0, failure="connection refused"))
    look(1010.0)
    assert history.block_s == 40.0
    assert [*history.sessions] == [0.0, 3.0, 3.0, 3.0, 0.0]


def test_a_server_is_what_it_said_last() -> None:
    online = make_announcement()
    observations = Observations(opened_at_s=0.0)
    assert observations.state(online) == "online"
    for told, state in (("online", "online"), ("draining", "draining"), ("joining", "joining"), ("offline", "online")):
        observations.note_probe(online.peer_id, Probe(at_s=0.0, state=told))
        assert observations.state(online) == state
    observations.note_probe(online.peer_id, Probe(at_s=0.0, failure="no answer"))
    assert observations.state(online) == "silent"


def test_nothing_is_kept_of_models_and_servers_that_are_gone() -> None:
    signed = make_announcement()
    observations = Observations(opened_at_s=0.0)
    observations.note_models([MODEL], at_s=0.0)
    observations.note_servers(MODEL, [signed], at_s=0.0)
    observations.note_probe(signed.peer_id, Probe(at_s=0.0, failure="no answer"))
    observations.note_servers(MODEL, [], at_s=1.0)
    assert not observations.probes
    assert not observations.overviews()
    observations.note_models([], at_s=2.0)
    assert not observations.bounds(MODEL)


def test_a_failed_look_up_keeps_what_was_seen() -> None:
    observations = Observations(opened_at_s=0.0)
    observations.note_models([MODEL], at_s=0.0)
    observations.note_servers(MODEL, [make_announcement()], at_s=1.0)
    observations.note_trouble("no node answers")
    assert len(observations.overviews()) == 1
    assert (observations.trouble, observations.looked_up_at_s) == ("no node answers", 1.0)
    observations.note_models([MODEL], at_s=5.0)
    assert observations.trouble == ""
