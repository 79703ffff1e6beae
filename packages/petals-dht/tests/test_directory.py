from __future__ import annotations

import asyncio
import time

import pytest

from petals_core.addresses import Address
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import ConfigurationError, InvalidAnnouncementError, InvalidRequestError, NoPeersError
from petals_core.identity import Identity
from petals_core.limits import MAX_DATAGRAM_BYTES
from petals_core.swarm_key import SwarmKey
from petals_dht.contacts import MODELS_KEY, model_key
from petals_dht.directory import Directory
from petals_dht.messages import Ping
from petals_dht.node import NodeTiming
from petals_dht.rates import Rate
from petals_dht.responder import NodeLimits
from petals_dht.storage import Entry, StorageLimits
from petals_dht.testing import FINGERPRINT, make_announcement, start_swarm

QUICK = NodeTiming(attempt_timeout_s=0.3)


def address_of(directory: Directory) -> Address:
    return Address("127.0.0.1", directory.port)


def plant(directory: Directory, signed: SignedAnnouncement, key: bytes = model_key(FINGERPRINT)) -> None:
    """Put an announcement into one node's storage, as if it had been stored there."""
    directory.node.storage.store(key, signed.encoded, source_host="192.0.2.1", now_s=directory.node.clock())


def test_servers_are_found_by_clients_and_nodes() -> None:
    async def main() -> None:
        async with start_swarm(12) as swarm:
            announced = [make_announcement(each.identity) for each in swarm[:5]]
            for each, signed in zip(swarm, announced, strict=False):
                assert await each.announce(signed) == 12
            async with await Directory.connect([address_of(swarm[7])]) as client:
                for directory in (client, swarm[0], swarm[11]):
                    found = await directory.find_servers(FINGERPRINT)
                    assert {signed.encoded for signed in found} == {signed.encoded for signed in announced}
                assert await client.find_servers("0" * 64) == []
                (model,) = await client.list_models()
                assert (model.model_name, model.fingerprint, model.num_blocks) == ("test-model", FINGERPRINT, 12)
                assert client.observed_host() == "127.0.0.1"
                assert client.initial_peers == (address_of(swarm[7]),)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_hundred_nodes_and_a_hundred_announcements() -> None:
    async def main() -> None:
        async with start_swarm(100) as swarm:
            holders = swarm[0].node.protocol.router.nearest(model_key(FINGERPRINT), 20)
            nodes = {each.node.protocol.own.id: each for each in swarm}
            announced = [make_announcement(public_name="x" * (number % 60)) for number in range(100)]
            for contact in holders:
                for signed in announced:
                    plant(nodes[contact.id], signed)
            async with await Directory.connect([address_of(swarm[50])]) as client:
                found = await client.find_servers(FINGERPRINT)
                assert {signed.encoded for signed in found} == {signed.encoded for signed in announced}
            largest = max(each.node.protocol.max_sent_bytes for each in swarm)
            assert 1000 < largest <= MAX_DATAGRAM_BYTES

    asyncio.run(main())


def test_answers_of_different_nodes_are_merged() -> None:
    async def main() -> None:
        async with start_swarm(4) as swarm:
            parts = [[make_announcement() for _ in range(7)] for _ in swarm]
            for each, part in zip(swarm, parts, strict=True):
                for signed in part:
                    plant(each, signed)
            found = await swarm[0].find_servers(FINGERPRINT)
            assert len(found) == 28
            assert {signed.encoded for signed in found} == {signed.encoded for part in parts for signed in part}

    asyncio.run(main())


def test_a_restarted_server_replaces_itself_at_once() -> None:
    async def main() -> None:
        now_s = time.time()
        async with start_swarm(3) as swarm:
            identity = swarm[1].identity
            await swarm[1].announce(make_announcement(identity, now_s=now_s - 5, start=0))
            await swarm[1].announce(make_announcement(identity, now_s=now_s, start=3))
            plant(swarm[2], make_announcement(identity, now_s=now_s - 5, start=0))
            (found,) = await swarm[2].find_servers(FINGERPRINT)
            assert found.announcement.start == 3

    asyncio.run(main())


def test_a_restarted_server_replaces_itself_although_its_clock_was_set_back() -> None:
    async def main() -> None:
        async with start_swarm(3) as swarm:
            identity, peers = Identity.ephemeral(), [address_of(swarm[0])]
            now_s = time.time()

            async def announce(directory: Directory, *, start: int, at_s: float) -> SignedAnnouncement:
                signed = make_announcement(identity, now_s=now_s + at_s, start=start, expires_at_s=now_s + at_s + 1800)
                await directory.announce(signed)
                return signed

            async def spans() -> list[int]:
                return [signed.announcement.start for signed in await swarm[1].find_servers(FINGERPRINT)]

            async with await Directory.connect(peers, identity=identity) as before:
                await announce(before, start=0, at_s=40)
            async with await Directory.connect(peers, identity=identity) as after:
                await announce(after, start=1, at_s=0)
                assert await spans() == [1]
                signed = await announce(after, start=2, at_s=10)
                assert await spans() == [2], "so does each one that follows"
                await after.withdraw(signed)
                assert await spans() == []
                await after.announce(signed)
                assert await spans() == [], "an older one of the same life does not come back"
            async with await Directory.connect(peers, identity=identity) as again:
                await announce(again, start=3, at_s=0)
                assert await spans() == [3]

    asyncio.run(main())


def test_nobody_elses_announcement_has_ours_dated_later() -> None:
    """Else a node that lies could have it dated so far ahead that others, whose clocks are behind, refuse it."""

    async def main() -> None:
        async with start_swarm(3) as swarm:
            given = make_announcement(swarm[0].identity)
            strange = make_announcement(now_s=given.announcement.issued_at_s + 50)
            slot = given.peer_id.digest
            swarm[2].node.storage._insert(model_key(FINGERPRINT), slot, Entry(strange, "192.0.2.66"))
            await swarm[0].announce(given)
            found = {signed.peer_id: signed for signed in await swarm[1].find_servers(FINGERPRINT)}
            assert found[given.peer_id] == given

    asyncio.run(main())


def test_announcing_again_searches_for_nobody() -> None:
    async def main() -> None:
        async with start_swarm(30, timing=QUICK) as swarm:
            server = swarm[3]

            def count() -> int:
                return sum(each.node.protocol.num_requests for each in swarm)

            assert await server.announce(make_announcement(server.identity)) >= 20
            before = count()
            again = make_announcement(server.identity, start=1)
            assert await server.announce(again) >= 20
            assert count() - before <= 20, "one request to each node that keeps it, and none for the list of models"
            assert await swarm[9].find_servers(FINGERPRINT) == [again]

            # Most of those that keep it leave: others are found at once. At first hardly anybody knows anybody.
            await asyncio.gather(*(each.node.nearest_nodes(each.node.protocol.own.id) for each in swarm))
            keepers = [each for each in swarm if each.node.storage.num_entries and each is not server]
            for each in keepers[:12]:
                await each.close()
            third = make_announcement(server.identity, start=2)
            assert await server.announce(third) >= 10
            (living,) = [each for each in swarm if each not in keepers and each is not server][:1]
            assert await living.find_servers(FINGERPRINT) == [third]

    asyncio.run(main())


def test_dead_nodes_hold_up_no_announcement() -> None:
    """Those that live have it while the dead one is still waited for."""

    async def main() -> None:
        async with start_swarm(5, timing=NodeTiming(attempt_timeout_s=60.0)) as swarm:
            await asyncio.gather(*(each.node.nearest_nodes(each.node.protocol.own.id) for each in swarm))
            await swarm[4].close()
            signed = make_announcement(swarm[1].identity)
            announcing = asyncio.create_task(swarm[1].announce(signed, timeout_s=5.0))
            found: list[SignedAnnouncement] = []
            while not found and not announcing.done():
                found = await swarm[2].find_servers(FINGERPRINT)
            assert found == [signed]
            assert not announcing.done()
            announcing.cancel()
            await asyncio.gather(announcing, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("swarm_key", [None, SwarmKey.generate()], ids=["open", "private"])
def test_clocks_a_minute_apart_agree(swarm_key: SwarmKey | None) -> None:
    async def main() -> None:
        shift_s = 0.0

        def clock() -> float:
            return time.time() + shift_s

        async with start_swarm(7, skew_s=59.0, swarm_key=swarm_key, timing=QUICK, clock=clock) as swarm:
            # In a private swarm nodes refuse what, by their clock, was sent before they started.
            shift_s = 60.0
            while any(len(each.node.protocol.router) < 6 for each in swarm):
                await asyncio.gather(*(each.node.nearest_nodes(each.node.protocol.own.id) for each in swarm))
            slowest, fastest = swarm[0], swarm[-1]
            for server in (slowest, fastest):
                now_s = server.node.clock()
                signed = make_announcement(server.identity, now_s=now_s, expires_at_s=now_s + 120)
                assert await server.announce(signed) == 7
            assert [len(await each.find_servers(FINGERPRINT)) for each in swarm] == [2] * 7
            assert [len(await each.list_models()) for each in swarm] == [1] * 7

    asyncio.run(main())


def test_a_server_that_withdraws_is_gone_even_where_the_note_did_not_arrive() -> None:
    async def main() -> None:
        async with start_swarm(4) as swarm:
            signed = make_announcement(swarm[1].identity)
            await swarm[1].announce(signed)
            assert len(await swarm[0].find_servers(FINGERPRINT)) == 1
            assert await swarm[1].withdraw(signed) == 4
            late = await Directory.start(Identity.ephemeral(), "127.0.0.1", initial_peers=[address_of(swarm[0])])
            async with late:
                plant(late, signed)
                for directory in (*swarm, late):
                    assert await directory.find_servers(FINGERPRINT) == []
            await swarm[1].announce(signed)
            assert await swarm[0].find_servers(FINGERPRINT) == [], "an older announcement does not come back"
            with pytest.raises(InvalidRequestError):
                await swarm[2].withdraw(signed)

    asyncio.run(main())


def test_announcements_expire_by_the_clock() -> None:
    async def main() -> None:
        async with start_swarm(2) as swarm:
            signed = make_announcement(swarm[1].identity)
            await swarm[1].announce(signed)
            expiry_s = signed.announcement.expires_at_s
            assert await swarm[0].find_servers(FINGERPRINT, now=expiry_s - 1) == [signed]
            assert await swarm[0].find_servers(FINGERPRINT, now=expiry_s) == []
            assert await swarm[0].list_models(now=expiry_s + 600) == []

    asyncio.run(main())


def test_what_liars_keep_is_never_returned() -> None:
    async def main() -> None:
        async with start_swarm(3) as swarm:
            good = make_announcement()
            plant(swarm[1], good)
            forged = good.encoded.replace(b"test-model", b"best-model")
            old = make_announcement(now_s=time.time() - 1000)
            for number, encoded in enumerate(
                (forged, old.encoded, b"\x93\xa0", make_announcement(fingerprint="e" * 64).encoded)
            ):
                keep_unchecked(swarm[2], model_key(FINGERPRINT), bytes([number]) * 32, encoded)
                keep_unchecked(swarm[2], MODELS_KEY, bytes([number]) * 32, encoded)
            assert await swarm[0].find_servers(FINGERPRINT) == [good]
            assert [model.fingerprint for model in await swarm[0].list_models()] == ["e" * 64]
            assert swarm[0].node.protocol.dropped["announcement"] >= 4

    asyncio.run(main())


def keep_unchecked(directory: Directory, key: bytes, slot: bytes, encoded: bytes) -> None:
    """Make a node keep what no honest node would."""
    carrier = make_announcement()
    lie = SignedAnnouncement(carrier.announcement, carrier.public_key, encoded)
    storage = directory.node.storage
    storage._insert(key, slot, Entry(lie, "192.0.2.66"))


def test_clients_are_in_nobodys_table_and_keep_nothing() -> None:
    async def main() -> None:
        async with start_swarm(3) as swarm, await Directory.connect([address_of(swarm[0])]) as client:
            await asyncio.gather(*(each.announce(make_announcement(each.identity)) for each in swarm))
            assert await client.announce(make_announcement(client.identity)) == 3
            assert len(await client.find_servers(FINGERPRINT)) == 4
            own_id = client.node.protocol.own.id
            assert all(own_id not in {known.id for known in each.node.protocol.router.contacts()} for each in swarm)
            assert client.node.storage.num_entries == 0
            assert not client.node.protocol.dropped, "nobody even asks it"
            ask = swarm[0].node.protocol.call
            address = ("127.0.0.1", client.port)
            assert await ask(address, Ping(), destination=None, timeout_s=0.1, num_attempts=1) is None
            assert client.node.protocol.dropped == {"client": 1}

    asyncio.run(main())


def test_private_swarms_know_only_their_members() -> None:
    async def main() -> None:
        key = SwarmKey.generate()
        async with start_swarm(3, swarm_key=key) as swarm:
            await swarm[1].announce(make_announcement(swarm[1].identity))
            peers = [address_of(each) for each in swarm]
            async with await Directory.connect(peers, swarm_key=key) as member:
                assert len(await member.find_servers(FINGERPRINT)) == 1
            for wrong in (None, SwarmKey.generate()):
                with pytest.raises(NoPeersError, match="same swarm key"):
                    await Directory.connect(peers, swarm_key=wrong, timeout_s=0.3)
            assert all(each.node.protocol.dropped["other swarm"] for each in swarm)
            assert all(len(each.node.protocol.router) == 2 for each in swarm)

    asyncio.run(main())


def test_no_peers_is_told_with_the_names_tried() -> None:
    async def main() -> None:
        async with start_swarm(1) as swarm:
            port = swarm[0].port
        with pytest.raises(NoPeersError, match=rf"127\.0\.0\.1:{port} \(no answer\)"):
            await Directory.connect([Address("127.0.0.1", port)], timeout_s=0.2)
        with pytest.raises(NoPeersError, match=r"no-such-host\.invalid:1 \(no such host\)"):
            await Directory.connect([Address("no-such-host.invalid", 1)], timeout_s=0.5)
        with pytest.raises(NoPeersError, match=r"\[::1\]:1 \(an IPv6 address, which we do not listen on\)"):
            await Directory.start(Identity.ephemeral(), "127.0.0.1", initial_peers=[Address("::1", 1)], timeout_s=0.2)
        with pytest.raises(ConfigurationError, match="--initial-peers"):
            await Directory.connect([])
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_swarm_that_vanished_is_an_error_and_not_empty() -> None:
    async def main() -> None:
        async with start_swarm(2, timing=QUICK) as swarm:
            client = await Directory.connect([address_of(swarm[0])], timing=QUICK)
        async with client:
            with pytest.raises(NoPeersError):
                await client.find_servers(FINGERPRINT, timeout_s=1)
            with pytest.raises(NoPeersError):
                await client.announce(make_announcement(client.identity))

    asyncio.run(main())


def test_dead_nodes_hide_nothing() -> None:
    async def main() -> None:
        async with start_swarm(12, timing=QUICK) as swarm:
            signed = make_announcement(swarm[1].identity)
            await swarm[1].announce(signed)
            for dead in swarm[4:]:
                await dead.close()
            async with await Directory.connect([address_of(swarm[0])], timing=QUICK) as client:
                assert await client.find_servers(FINGERPRINT) == [signed]
            assert await swarm[1].announce(make_announcement(swarm[1].identity)) == 4

    asyncio.run(main())


def test_many_look_ups_at_once_and_cancelled_ones() -> None:
    async def main() -> None:
        async with start_swarm(5) as swarm, await Directory.connect([address_of(swarm[0])]) as client:
            await swarm[1].announce(make_announcement(swarm[1].identity))
            cancelled = [asyncio.create_task(client.find_servers(FINGERPRINT)) for _ in range(10)]
            found = [asyncio.create_task(client.find_servers(FINGERPRINT)) for _ in range(40)]
            await asyncio.wait(found, return_when=asyncio.FIRST_COMPLETED)
            for task in cancelled:
                task.cancel()
            assert all(len(servers) == 1 for servers in await asyncio.gather(*found))
            await asyncio.gather(*cancelled, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_node_that_falls_silent_while_it_is_read_holds_back_nothing() -> None:
    async def main() -> None:
        async with start_swarm(3) as swarm:
            honest = [make_announcement(public_name="x" * 60) for _ in range(9)]
            for signed in honest:
                plant(swarm[1], signed)
            # It answers what is needed to join and to be found, and then nothing more.
            reluctant = NodeLimits(request_rate=Rate(per_s=0.001, burst=6))
            silent = await Directory.start(
                Identity.ephemeral(), "127.0.0.1", initial_peers=[address_of(swarm[0])], limits=reluctant
            )
            async with silent, await Directory.connect([address_of(swarm[0])]) as client:
                for _ in range(9):
                    plant(silent, make_announcement(public_name="x" * 60))
                for _ in range(3):
                    assert set(honest) <= set(await client.find_servers(FINGERPRINT))

    asyncio.run(main())


def test_an_expired_announcement_is_refused_here_already() -> None:
    async def main() -> None:
        async with start_swarm(1) as swarm:
            with pytest.raises(InvalidAnnouncementError, match="expired"):
                await swarm[0].announce(make_announcement(now_s=time.time() - 1000))
            assert await swarm[0].announce(make_announcement()) == 1, "alone it keeps its own"

    asyncio.run(main())


def test_servers_beyond_what_a_key_holds_are_announced_and_found() -> None:
    """Nodes that keep few and say that they are full: the next ones go under the keys below, and all are found."""

    async def main() -> None:
        async with start_swarm(6, storage_limits=StorageLimits(max_entries_per_key=768)) as swarm:
            crowd = [make_announcement() for _ in range(768)]
            for directory in swarm:
                for number, signed in enumerate(crowd):
                    directory.node.storage.store(
                        model_key(FINGERPRINT), signed.encoded, source_host=f"192.0.2.{number % 250}", now_s=time.time()
                    )
            late = Directory(swarm[0].node, Identity.ephemeral())
            signed = make_announcement(late.identity, start=7, end=9)
            assert await late.announce(signed) >= 6
            below = model_key(FINGERPRINT, late.identity.peer_id.digest.hex()[:1])
            assert all(each.node.storage.count(below, now_s=time.time()) == 1 for each in swarm)
            async with await Directory.connect([address_of(swarm[3])]) as client:
                found = await client.find_servers(FINGERPRINT)
                assert signed in found
                assert len(found) >= 768
                part = await client.find_servers(FINGERPRINT, wanted=1)
                assert signed in part, "no block of it is held often enough, so all keys are looked at"
                assert await late.withdraw(signed) >= 6
                assert signed.peer_id not in {each.peer_id for each in await client.find_servers(FINGERPRINT)}

    asyncio.run(main())
