"""Delays to servers that may come next: who is measured, what is announced, what is left behind."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from petals_core.addresses import Address
from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.identity import Identity
from petals_core.limits import MAX_ANNOUNCEMENT_BYTES, MAX_NEXT_DELAYS
from petals_core.net.listener import Listener
from petals_core.net.stream import Stream
from petals_core.testing.network import run_clean
from petals_server.neighbours import MAX_MEASURED, Neighbours, choose_likely
from petals_server.testing import until

OWN = Identity.ephemeral()


def announced(start: int, end: int, identity: Identity | None = None, **changes: Any) -> SignedAnnouncement:
    announcement = Announcement(
        model_name="demo",
        fingerprint="f" * 64,
        num_blocks=8,
        start=start,
        end=end,
        addresses=(Address("127.0.0.1", 1),),
        state="online",
        torch_dtype="float32",
        issued_at_s=1.0,
        expires_at_s=100.0,
    )
    return SignedAnnouncement.sign(replace(announcement, **changes), identity or Identity.ephemeral())


def test_who_may_come_next() -> None:
    next_ones = [announced(4, 8), announced(3, 5)]
    others = [announced(2, 6), announced(5, 8), announced(3, 4), announced(4, 8, state="draining")]
    chosen = choose_likely([*next_ones, *others, announced(4, 8, OWN)], 2, 4, own=OWN.peer_id)
    assert chosen == next_ones


def test_delays_are_measured_a_few_at_a_time_and_forgotten_with_their_servers() -> None:
    async def serve(stream: Stream) -> None:
        raise AssertionError("nothing is asked")

    async def run() -> None:
        identities = [Identity.ephemeral() for _ in range(MAX_MEASURED + 2)]
        listeners = [await Listener.start(identity=each, handler=serve, host="127.0.0.1") for each in identities]
        servers = [
            announced(4, 8, identity, addresses=(Address("127.0.0.1", listener.port),))
            for identity, listener in zip(identities, listeners, strict=True)
        ]
        servers.append(announced(4, 8))  # not there

        async def find() -> list[SignedAnnouncement]:
            return servers

        neighbours = Neighbours(find, identity=OWN, swarm_key=None, start=2, end=4, rng=random.Random(0))
        await neighbours.measure()
        assert len(neighbours.delays) in (MAX_MEASURED - 1, MAX_MEASURED)
        await neighbours.measure()
        assert len(neighbours.delays) == MAX_NEXT_DELAYS
        delays = [delay_s for _, delay_s in neighbours.delays]
        assert delays == sorted(delays)
        assert all(0 < delay_s < 1 for delay_s in delays)
        del servers[1:]
        await neighbours.measure()
        assert [digest for digest, _ in neighbours.delays] == [identities[0].peer_id.digest]
        await neighbours.close()
        for listener in listeners:
            await listener.close()

    run_clean(run())


def test_servers_announce_them(tmp_path: Path) -> None:
    from petals_core.testing.factories import make_checkpoint
    from petals_server.testing import InProcessSwarm

    folder = make_checkpoint(tmp_path / "tiny", "llama", num_blocks=2)
    swarm = InProcessSwarm()
    try:
        last = swarm.add(folder, 1, 2)
        first = swarm.add(folder, 0, 1)

        async def wait() -> None:
            assert first._neighbours is not None
            await until(lambda: bool(first._neighbours and first._neighbours.delays))

        swarm.run(wait())
        ((digest, delay_s),) = first._describe(1.0, 2.0).next_delays
        assert digest == last.peer_id.digest
        assert 0 < delay_s < 1
        assert last._describe(1.0, 2.0).next_delays == ()
    finally:
        swarm.close()


def test_an_announcement_leaves_out_delays_for_which_there_is_no_room() -> None:
    from petals_server.announcer import Announcer

    delays = tuple((bytes([number]) * 32, 0.1) for number in range(MAX_NEXT_DELAYS))
    crowded = announced(0, 4, adapters=tuple(f"{'a' * 58}{number}" for number in range(4))).announcement
    announcer = Announcer(
        None,  # type: ignore[arg-type]  # nothing is sent
        OWN,
        lambda now_s, expires_at_s: crowded,
        interval_s=1.0,
        lifetime_s=10.0,
        rng=random.Random(0),
    )
    signed = announcer._sign(replace(crowded, next_delays=delays))
    assert 0 < len(signed.announcement.next_delays) < MAX_NEXT_DELAYS
    assert len(signed.encoded) <= MAX_ANNOUNCEMENT_BYTES
