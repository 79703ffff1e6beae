"""Delays to servers that may come next: who is measured, what is announced, what is left behind."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from petals_core.addresses import Address
from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.identity import Identity, PeerId
from petals_core.limits import MAX_ANNOUNCEMENT_BYTES, MAX_NEXT_DELAYS
from petals_core.net.listener import Listener
from petals_core.net.stream import Stream
from petals_core.next_delays import NextDelays
from petals_core.testing.network import run_clean
from petals_core.wire.messages import ContributionNoted, InfoRequest
from petals_dht.testing import make_info
from petals_server.neighbours import MAX_MEASURED, Neighbours, choose_likely
from petals_server.placement.view import look
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


def make_neighbours(
    find: Callable[[], Awaitable[list[SignedAnnouncement]]], start: int = 2, end: int = 4
) -> Neighbours:
    return Neighbours(find, identity=OWN, swarm_key=None, start=start, end=end, hidden_size=64, rng=random.Random(0))


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

        neighbours = make_neighbours(find)
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
        assert last._describe(1.0, 2.0).next_delays == NextDelays()
    finally:
        swarm.close()


def test_what_neighbours_time_tells_who_boasts(tmp_path: Path) -> None:
    """Three servers push to one on a thin line that announces a fast one: for others it counts for less."""
    from petals_core.testing.factories import make_checkpoint
    from petals_server.testing import InProcessSwarm

    folder = make_checkpoint(tmp_path / "wide", "llama", num_blocks=2, hidden_size=512)
    swarm = InProcessSwarm()
    try:
        boaster = swarm.add(folder, 1, 2, max_upload_bytes_per_s=30_000.0)
        honest = swarm.add(folder, 1, 2)
        observers = [swarm.add(folder, 0, 1) for _ in range(3)]

        async def observe() -> None:
            for server in observers:
                assert server._neighbours is not None
                for _ in range(3):  # delays first, and then one server at each look
                    await server._neighbours.measure()
                await server.announce()

        async def find() -> dict[PeerId, Announcement]:
            found = await boaster._directory.find_servers(boaster.model.fingerprint)
            return {signed.peer_id: signed.announcement for signed in found}

        swarm.run(observe())
        found = swarm.run(find())
        for server in observers:
            seen = dict(found[server.peer_id].observed)
            assert seen[boaster.peer_id.digest[:8]] < seen[honest.peer_id.digest[:8]]
        view = look({peer_id.digest: announcement for peer_id, announcement in found.items()}, num_blocks=2)
        believed = {each.peer_id: each.tokens_per_s for each in view.servers}
        announced_rate = found[boaster.peer_id].inference_tokens_per_s
        assert announced_rate is not None
        assert believed[boaster.peer_id.digest] < 0.7 * announced_rate
        assert boaster.num_sessions == honest.num_sessions == 0
    finally:
        swarm.close()


def test_one_that_answers_nonsense_is_not_timed() -> None:
    """Nor one that takes no session, one that announces no speed, or one that was timed lately."""

    async def run() -> None:
        asked: list[str] = []

        async def serve(stream: Stream) -> None:
            request = (await stream.receive(timeout_s=None)).body
            asked.append(type(request).__name__)
            if isinstance(request, InfoRequest):
                await stream.send(make_info(server), end=True)
            else:
                await stream.send(ContributionNoted(weight=1.0), end=True)

        identity = Identity.ephemeral()
        listener = await Listener.start(identity=identity, handler=serve, host="127.0.0.1")
        address = (Address("127.0.0.1", listener.port),)
        server = announced(4, 8, identity, addresses=address, inference_tokens_per_s=10.0)

        async def find() -> list[SignedAnnouncement]:
            return [server]

        neighbours = make_neighbours(find)
        for _ in range(3):
            await neighbours.measure()
        assert asked == ["InfoRequest", "OpenSession"]
        assert neighbours.percents == ()
        await neighbours.close()
        await listener.close()

    run_clean(run())


def test_an_announcement_leaves_out_delays_for_which_there_is_no_room() -> None:
    from petals_server.announcer import Announcer

    delays = NextDelays.of((bytes([number]) * 32, 0.1) for number in range(MAX_NEXT_DELAYS))
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
