from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket

import pytest

from petals_core import schema
from petals_core.addresses import Address
from petals_core.errors import ConfigurationError
from petals_core.identity import Identity
from petals_core.swarm_key import SwarmKey
from petals_dht import messages
from petals_dht.contacts import Contact, model_key, node_id
from petals_dht.datagrams import Datagram, DatagramSeal, Kind, ReplayWindow
from petals_dht.messages import DIGEST_BYTES, CheckReachable, Find, FindNode, Found, Ping, Pong, Request, Store, Stored
from petals_dht.node import Node, NodeTiming, total_of
from petals_dht.rates import Rate
from petals_dht.responder import NodeLimits
from petals_dht.sockets import bind_udp
from petals_dht.testing import FINGERPRINT, make_announcement

KEY = model_key(FINGERPRINT)
STRANGER = b"s" * 20
ELSEWHERE = ("127.0.0.1", 9)


def seal_request(node: Node, request: Request, *, swarm_key: SwarmKey | None = None, sender: bytes = STRANGER) -> bytes:
    """The datagram that a stranger sends to ``node``."""
    datagram = Datagram(
        kind=Kind.REQUEST,
        request_id=os.urandom(16),
        sender=sender,
        destination=node.protocol.own.id,
        is_client=True,
        body=messages.encode(request),
    )
    seal = DatagramSeal(sender, swarm_key, ReplayWindow(started_at_s=0))
    return seal.seal(datagram, now_s=node.clock(), nonce=os.urandom(12))


async def start_pair(**options: object) -> tuple[Node, Node]:
    first = await Node.start(Identity.ephemeral(), "127.0.0.1", **options)  # type: ignore[arg-type]
    peers = [Address("127.0.0.1", first.port)]
    second = await Node.start(Identity.ephemeral(), "127.0.0.1", initial_peers=peers, **options)  # type: ignore[arg-type]
    return first, second


def test_node_ids_come_from_identities() -> None:
    async def main() -> None:
        identity = Identity.ephemeral()
        node = await Node.start(identity, "127.0.0.1")
        assert node.protocol.own.id == node_id(identity.peer_id) == identity.peer_id.digest[:20]
        await node.close()

    asyncio.run(main())


def test_a_join_waits_for_a_node_that_starts_late() -> None:
    async def main() -> None:
        late = bind_udp("127.0.0.1", 0)
        address = Address("127.0.0.1", late.getsockname()[1])
        joining = asyncio.create_task(Node.start(Identity.ephemeral(), "127.0.0.1", initial_peers=[address]))
        # The socket is there and nobody answers on it; the second datagram shows that the joiner asks again.
        for _ in range(2):
            await asyncio.get_running_loop().sock_recv(late, 2000)
        assert not joining.done()
        bootstrap = await Node.start(Identity.ephemeral(), sock=late)
        joined = await joining
        assert [contact.port for contact in joined.protocol.router.contacts()] == [bootstrap.port]
        await joined.close()
        await bootstrap.close()

    asyncio.run(main())


def test_a_lost_bootstrap_node_is_met_again_when_it_is_back() -> None:
    async def main() -> None:
        first, second = await start_pair(timing=NodeTiming(attempt_timeout_s=0.2, silence_s=0))
        port = first.port
        await first.close()
        await second.maintain()
        assert len(second.protocol.router) == 0
        back = await Node.start(Identity.ephemeral(), "127.0.0.1", port)
        await second.maintain()
        assert [contact.id for contact in second.protocol.router.contacts()] == [back.protocol.own.id]
        signed = make_announcement()
        assert await second.store(KEY, signed.encoded) == 2
        assert back.storage.num_entries == 1
        await back.close()
        await second.close()

    asyncio.run(main())


def test_a_port_in_use_is_told() -> None:
    async def main() -> None:
        node = await Node.start(Identity.ephemeral(), "127.0.0.1")
        with pytest.raises(ConfigurationError, match=f"port {node.port} is in use: choose another with --port"):
            await Node.start(Identity.ephemeral(), "127.0.0.1", node.port)
        with pytest.raises(ConfigurationError, match="can't listen on"):
            await Node.start(Identity.ephemeral(), "192.0.2.1")
        await node.close()

    asyncio.run(main())


def test_hostile_datagrams_change_nothing() -> None:
    async def main() -> None:
        random_ = random.Random(0)
        node, other = await start_pair()
        await node.store(KEY, make_announcement().encoded)
        requests: list[Request] = [
            Ping(),
            FindNode(key=KEY),
            Find(key=KEY),
            Store(key=KEY, token=b"t" * 8, entry=make_announcement().encoded),
            CheckReachable(token=b"t" * 8, port=1, peer_id=bytes(32)),
        ]
        before = node.storage.page(KEY, now_s=node.clock(), max_bytes=10_000)
        num_contacts = len(node.protocol.router)
        num_tasks = len(asyncio.all_tasks())
        for _ in range(4000):
            content = bytearray(seal_request(node, random_.choice(requests)))
            match random_.randrange(4):
                case 0:
                    content = bytearray(random_.randbytes(random_.randrange(1400)))
                case 1:
                    del content[random_.randrange(len(content)) :]
                case 2:
                    # The id of the node stays, so that the content is looked at.
                    content[random_.randrange(60, len(content))] = random_.randrange(256)
                case _:
                    content[60:] = b"\x00" + schema.pack({"kind": "store", "key": [[]] * 9, "token": {}, "entry": -1})
            node.protocol.datagram_received(bytes(content), ELSEWHERE)
        assert node.storage.page(KEY, now_s=node.clock(), max_bytes=10_000) == before
        assert len(node.protocol.router) == num_contacts
        assert len(asyncio.all_tasks()) - num_tasks <= 64
        assert sum(node.protocol.dropped.values()) > 1000
        assert await other.protocol.call_ping(Contact(node.protocol.own.id, "127.0.0.1", node.port)) is not None
        await node.close()
        await other.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_stores_need_the_token_of_their_address() -> None:
    async def main() -> None:
        node, other = await start_pair()
        contact = Contact(node.protocol.own.id, "127.0.0.1", node.port)
        encoded = make_announcement().encoded
        greeting = await node.protocol.call_ping(Contact(other.protocol.own.id, "127.0.0.1", other.port))
        assert greeting is not None
        assert isinstance(greeting.response, Pong)
        other_token = greeting.response.token  # of another node
        for token in (bytes(8), other_token, bytes(7) + b"x"):
            answer = await other.protocol.call_contact(contact, Store(key=KEY, token=token, entry=encoded))
            assert answer is not None
            assert isinstance(answer.response, Stored)
            assert not answer.response.is_kept
        assert node.storage.num_entries == 0
        pong = await other.protocol.call_ping(contact)
        assert pong is not None
        assert isinstance(pong.response, Pong)
        answer = await other.protocol.call_contact(contact, Store(key=KEY, token=pong.response.token, entry=encoded))
        assert answer is not None
        assert answer.response == Stored(is_kept=True, total=1)
        await node.close()
        await other.close()

    asyncio.run(main())


def test_a_recorded_datagram_is_worthless() -> None:
    async def main() -> None:
        key = SwarmKey.generate()
        node, other = await start_pair(swarm_key=key)
        recorded = seal_request(node, FindNode(key=KEY), swarm_key=key)
        eavesdropper = bind_udp("127.0.0.1", 0)
        loop = asyncio.get_running_loop()
        await loop.sock_sendto(eavesdropper, recorded, ("127.0.0.1", node.port))
        assert await loop.sock_recv(eavesdropper, 2000), "the first time it is taken"
        for target in (node, other):
            target.protocol.datagram_received(recorded, eavesdropper.getsockname())
        assert node.protocol.dropped["stale"] == 1
        assert other.protocol.dropped["other node"] == 1
        for request in (Ping(), Find(key=KEY), Store(key=KEY, token=b"t" * 8, entry=make_announcement().encoded)):
            for wrong in (None, SwarmKey.generate()):
                node.protocol.datagram_received(
                    seal_request(node, request, swarm_key=wrong), eavesdropper.getsockname()
                )
        assert node.protocol.dropped["other swarm"] + node.protocol.dropped["malformed"] == 6
        await other.protocol.call_ping(Contact(node.protocol.own.id, "127.0.0.1", node.port))
        with pytest.raises(BlockingIOError):
            eavesdropper.recv(2000)
        eavesdropper.close()
        await node.close()
        await other.close()

    asyncio.run(main())


def test_a_source_has_a_rate() -> None:
    async def main() -> None:
        node = await Node.start(
            Identity.ephemeral(), "127.0.0.1", limits=NodeLimits(request_rate=Rate(per_s=0.001, burst=3))
        )
        for _ in range(10):
            node.protocol.datagram_received(seal_request(node, FindNode(key=KEY)), ELSEWHERE)
        assert node.protocol.dropped == {"rate": 7}
        await node.close()

    asyncio.run(main())


def test_only_who_answers_enters_the_table() -> None:
    async def main() -> None:
        node, other = await start_pair(timing=NodeTiming(attempt_timeout_s=0.1))
        silent = bind_udp("127.0.0.1", 0)
        datagram = bytearray(seal_request(node, FindNode(key=KEY)))
        datagram[60] = 0  # not a client
        node.protocol.datagram_received(bytes(datagram), silent.getsockname())
        assert await asyncio.get_running_loop().sock_recv(silent, 2000), "the answer"
        assert await asyncio.get_running_loop().sock_recv(silent, 2000), "a ping to see whether it is real"
        assert {contact.id for contact in node.protocol.router.contacts()} == {other.protocol.own.id}
        silent.close()
        await node.close()
        await other.close()

    asyncio.run(main())


def test_an_unknown_attribute_is_no_remote_call() -> None:
    async def main() -> None:
        node = await Node.start(Identity.ephemeral(), "127.0.0.1")
        with pytest.raises(AttributeError):
            node.protocol.stun  # noqa: B018
        await node.close()

    asyncio.run(main())


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_a_dual_stack_node_speaks_to_both_families() -> None:
    async def main() -> None:
        dual = await Node.start(Identity.ephemeral(), "::")
        over_4 = await Node.start(Identity.ephemeral(), "127.0.0.1", initial_peers=[Address("127.0.0.1", dual.port)])
        over_6 = await Node.start(Identity.ephemeral(), "::1", initial_peers=[Address("::1", dual.port)])
        for node in (over_4, over_6):
            (contact,) = node.protocol.router.contacts()
            assert contact.id == dual.protocol.own.id
        assert over_4.observed_host() == "127.0.0.1"
        assert over_6.observed_host() == "::1"
        signed = make_announcement()
        await over_4.store(KEY, signed.encoded)
        assert (await over_6.find(KEY)).announcements == (signed,)
        for node in (over_4, over_6, dual):
            await node.close()

    asyncio.run(main())


def test_many_dead_nodes_hold_up_no_request_to_another() -> None:
    async def main() -> None:
        node = await Node.start(Identity.ephemeral(), "127.0.0.1", timing=NodeTiming(attempt_timeout_s=30.0))
        living = await Node.start(Identity.ephemeral(), "127.0.0.1")
        with contextlib.closing(bind_udp("127.0.0.1", 0)) as deaf:
            dead = Contact(bytes(20), "127.0.0.1", deaf.getsockname()[1])
            waiting = [asyncio.create_task(node.protocol.call_ping(dead)) for _ in range(200)]
            answer = await node.protocol.call_ping(Contact(living.protocol.own.id, "127.0.0.1", living.port))
            assert answer is not None
            assert not any(task.done() for task in waiting)
            await node.close()
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await living.close()

    asyncio.run(main())


def test_how_many_entries_a_key_has_is_said_by_the_nodes_nearest_to_it() -> None:
    """Those that a long search asks on its way keep none, and may be more."""

    def page(number: int, total: int) -> tuple[Contact, Found]:
        near = bytes([KEY[0] ^ (number >= 20)]) + KEY[1:19] + bytes([KEY[19] ^ number])
        found = Found(token=bytes(8), entries=(), total=total, digest=bytes(DIGEST_BYTES))
        return Contact(near, "127.0.0.1", 1 + number), found

    pages = dict(page(number, 900 if number < 20 else 0) for number in random.Random(0).sample(range(60), 60))
    assert total_of(KEY, pages, width=20) == 900
