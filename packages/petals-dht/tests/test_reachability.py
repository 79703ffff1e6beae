from __future__ import annotations

import asyncio

from petals_core.addresses import Address
from petals_core.identity import Identity, PeerId
from petals_core.net.listener import Listener
from petals_core.net.stream import Stream
from petals_dht.directory import Directory
from petals_dht.rates import Rate
from petals_dht.reachability import CHECK_TIMEOUT_S, Reachability, dial_back
from petals_dht.responder import NodeLimits
from petals_dht.testing import start_swarm


def test_peers_connect_to_where_the_question_came_from() -> None:
    asked: list[tuple[str, int, PeerId]] = []
    outcome = ""

    async def reach(host: str, port: int, peer_id: PeerId) -> str:
        asked.append((host, port, peer_id))
        return outcome

    async def main() -> None:
        nonlocal outcome
        async with start_swarm(3, reach=reach) as swarm:
            peer_id = swarm[0].identity.peer_id
            assert await swarm[0].check_reachable(4242, peer_id) == Reachability("127.0.0.1", True, "")
            assert set(asked) == {("127.0.0.1", 4242, peer_id)}
            outcome = "connection\nrefused"
            assert await swarm[0].check_reachable(4242, peer_id) == Reachability(
                "127.0.0.1", False, "connection refused"
            )

    asyncio.run(main())


def test_the_first_that_could_connect_decides() -> None:
    async def main() -> None:
        asked: list[asyncio.Event] = []

        async def reach(host: str, port: int, peer_id: PeerId) -> str:
            asked.append(asyncio.Event())
            if len(asked) == 1:
                await asyncio.sleep(0)
                return ""
            await asked[-1].wait()
            return "too late"

        loop = asyncio.get_running_loop()
        async with start_swarm(4, reach=reach) as swarm:
            started_s = loop.time()
            assert (await swarm[0].check_reachable(4242, swarm[0].identity.peer_id)).is_reachable
            assert loop.time() - started_s < CHECK_TIMEOUT_S, "it does not wait until the others are given up"
            assert not any(event.is_set() for event in asked)

    asyncio.run(main())


def test_nobody_to_ask() -> None:
    async def main() -> None:
        async with start_swarm(1) as swarm:
            found = await swarm[0].check_reachable(1, swarm[0].identity.peer_id)
            assert found == Reachability(None, None, "no other peer could be asked")
        async with start_swarm(2) as swarm:
            found = await swarm[0].check_reachable(1, swarm[0].identity.peer_id)
            assert found == Reachability("127.0.0.1", None, "this node makes no connections")

    asyncio.run(main())


def test_checks_are_limited() -> None:
    async def main() -> None:
        async def reach(host: str, port: int, peer_id: PeerId) -> str:
            return ""

        limits = NodeLimits(reach_rate=Rate(per_s=0.001, burst=1))
        async with (
            await Directory.start(Identity.ephemeral(), "127.0.0.1", reach=reach, limits=limits) as node,
            await Directory.connect([Address("127.0.0.1", node.port)]) as client,
        ):
            peer_id = client.identity.peer_id
            assert (await client.check_reachable(1, peer_id)).is_reachable
            found = await client.check_reachable(1, peer_id)
            assert found == Reachability("127.0.0.1", None, "too many checks at once")

    asyncio.run(main())


def test_the_dial_back_meets_the_right_peer_or_says_why_not() -> None:
    async def main() -> None:
        async def handle(stream: Stream) -> None:
            stream.cancel()

        identity = Identity.ephemeral()
        listener = await Listener.start(identity=identity, host="127.0.0.1", port=0, handler=handle)
        reach = dial_back(Identity.ephemeral(), None)
        assert await reach("127.0.0.1", listener.port, identity.peer_id) == ""
        assert await reach("127.0.0.1", listener.port, Identity.ephemeral().peer_id) != ""
        await listener.close(0)
        assert await reach("127.0.0.1", listener.port, identity.peer_id) != ""
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
