from __future__ import annotations

from pathlib import Path

import pytest

from petals_core.addresses import Address
from petals_core.errors import DrainingError
from petals_core.identity import Identity
from petals_server.config import PlacementTiming, ServerConfig
from petals_server.server import Server
from petals_server.testing import InProcessSwarm, connected, random_states, until

TIMING = PlacementTiming(interval_s=0.4, settle_s=4.0, drain_s=0.0, repair_drain_s=0.0)


def start(swarm: InProcessSwarm, model: Path, count: int, num_blocks: int) -> list[Server]:
    """Start servers at once, which choose their blocks themselves."""

    def config() -> ServerConfig:
        return ServerConfig(
            model=str(model),
            num_blocks=num_blocks,
            host="127.0.0.1",
            port=0,
            identity=Identity.ephemeral(),
            initial_peers=tuple(map(Address.parse, swarm.initial_peers)),
            cache_tokens=1024,
            num_threads=1,
            placement=TIMING,
        )

    starting = [swarm.start(Server.start(config())) for _ in range(count)]
    servers = [future.result(timeout=60) for future in starting]
    swarm.servers += servers
    return servers


def is_whole(swarm: InProcessSwarm) -> bool:
    held = {block for server in swarm.servers if server.is_online for block in range(*server.span)}
    return held == {0, 1, 2, 3}


@pytest.fixture
def swarm() -> InProcessSwarm:
    return InProcessSwarm()


def test_servers_that_start_at_once_hold_all_blocks_and_fill_what_others_leave(
    swarm: InProcessSwarm, checkpoint: Path
) -> None:
    async def wait_until_whole() -> None:
        await until(lambda: is_whole(swarm))

    async def session_is_told_to_go_elsewhere(server: Server) -> None:
        before = server.span
        async with connected(server) as client:
            session = await client.open()
            await session.step([random_states(1, 2)[0]])
            await until(lambda: server.span != before)
            with pytest.raises(DrainingError):
                await session.step([random_states(1, 1)[0]])

    try:
        servers = start(swarm, checkpoint, 3, 2)
        assert is_whole(swarm)
        (lone,) = (each for each in servers if sum(other.span == each.span for other in servers) == 1)
        twins = [each for each in servers if each is not lone]
        swarm.remove(lone)
        assert not is_whole(swarm)
        told = [swarm.start(session_is_told_to_go_elsewhere(twin)) for twin in twins]
        swarm.run(wait_until_whole())
        moved = [future for future, twin in zip(told, twins, strict=True) if twin.span == lone.span]
        assert len(moved) == 1
        moved[0].result(timeout=30)
        for future in told:
            future.cancel()
    finally:
        swarm.close()
