"""From configuration to announcement and back."""

import socket
from pathlib import Path
from typing import Any

import pytest

from petals_core.addresses import Address
from petals_core.errors import (
    AuthenticationError,
    CheckpointError,
    ConfigurationError,
    DeviceError,
    NoPeersError,
    PetalsError,
)
from petals_core.identity import Identity
from petals_core.net.dialer import Dialer
from petals_core.swarm_key import SwarmKey
from petals_core.testing.network import run_clean
from petals_dht.directory import Directory
from petals_server.server import Server
from petals_server.testing import config_for, served


def test_servers_fill_the_gaps_of_a_swarm_and_are_forgotten_when_they_leave(checkpoint: Path) -> None:
    async def run() -> None:
        async with (
            Server(config_for(checkpoint, blocks=(1, 3))) as first,
            await Directory.connect([first.address]) as directory,
        ):
            fingerprint = first.model.fingerprint

            async def spans() -> dict[tuple[int, int], str]:
                found = await directory.find_servers(fingerprint)
                return {(each.announcement.start, each.announcement.end): each.announcement.state for each in found}

            second = await Server.start(config_for(checkpoint, num_blocks=1, initial_peers=(first.address,)))
            async with Server(config_for(checkpoint, num_blocks=1, initial_peers=(second.address,))) as third:
                assert {(server.model.span.start, server.model.span.end) for server in (second, third)} == {
                    (0, 1),
                    (3, 4),
                }
                assert await spans() == dict.fromkeys([(0, 1), (1, 3), (3, 4)], "online")
                (announced,) = [
                    each for each in await directory.find_servers(fingerprint) if each.peer_id == third.peer_id
                ]
                assert announced.announcement.addresses == (third.address,)
                assert announced.announcement.cache_tokens_left == third.cache_tokens_left
                assert (announced.announcement.inference_tokens_per_s or 0) > 0
                await second.stop()
                assert await spans() == dict.fromkeys([(1, 3), (3, 4)], "online")
            assert await spans() == {(1, 3): "online"}

    run_clean(run())


def test_a_server_takes_all_blocks_that_memory_holds(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint, cache_tokens=None, num_threads=None) as client:
            span = client.server.model.span
            assert (span.start, span.end) == (0, 4)
            assert client.server.cache_tokens_left > 10_000
            assert client.server.model.threads.decode >= 1

    run_clean(run())


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"blocks": (2, 5)}, ConfigurationError, "has blocks 0:4, which do not include 2:5"),
        ({"num_blocks": 5}, ConfigurationError, "--num-blocks 5: the model has only 4 blocks"),
        ({"model": "no/such/folder"}, CheckpointError, "no/such/folder"),
        ({"device": "abacus"}, ConfigurationError, "--device abacus"),
        ({"device": "meta"}, ConfigurationError, "--device meta"),
        ({"device": "cuda:99"}, DeviceError, "no device cuda:99"),
        ({"host": "192.0.2.1"}, ConfigurationError, "can't listen on 192.0.2.1"),
        (
            {"host": "127.0.0.1", "initial_peers": (Address("203.0.113.5", 31330),)},
            ConfigurationError,
            "--host 127.0.0.1 is this machine alone.* set --announce-host",
        ),
    ],
)
def test_a_server_that_can_not_start_leaves_nothing_behind(
    checkpoint: Path, changes: dict[str, Any], error: type[PetalsError], text: str
) -> None:
    async def run() -> None:
        with pytest.raises(error, match=text):
            await Server.start(config_for(checkpoint, **changes))

    run_clean(run())


def test_a_private_swarm_lets_in_who_knows_its_key(checkpoint: Path) -> None:
    key = SwarmKey.generate()

    async def run() -> None:
        async with Server(config_for(checkpoint, swarm_key=key)) as server:
            stranger = Dialer(identity=Identity.ephemeral(), swarm_key=SwarmKey.generate())
            with pytest.raises(AuthenticationError):
                await stranger.connect([server.address], peer_id=server.peer_id)
            await stranger.close()
            with pytest.raises(NoPeersError):
                await Directory.connect([server.address], timeout_s=0.2)
            member = Dialer(identity=Identity.ephemeral(), swarm_key=key)
            assert (await member.connect([server.address], peer_id=server.peer_id)).peer_id == server.peer_id
            await member.close()

    run_clean(run())


def test_a_swarm_on_this_machine_listens_on_it_alone(checkpoint: Path) -> None:
    async def run() -> None:
        async with Server(config_for(checkpoint)) as server:
            assert server.address.host == "127.0.0.1"

    run_clean(run())


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_servers_meet_on_the_loopback_of_ipv6(checkpoint: Path) -> None:
    async def run() -> None:
        async with (
            Server(config_for(checkpoint, blocks=(0, 2), host="::1")) as first,
            Server(config_for(checkpoint, blocks=(2, 4), initial_peers=(first.address,))) as second,
            await Directory.connect([second.address]) as directory,
        ):
            assert (first.address.host, second.address.host) == ("::1", "::1")
            assert len(await directory.find_servers(first.model.fingerprint)) == 2

    run_clean(run())


def test_an_address_of_which_nothing_can_be_seen_is_announced_with_a_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with Server(config_for(checkpoint, blocks=(0, 1))) as first:
            changes = {"initial_peers": (first.address,), "host": "127.0.0.1", "announce_host": "no-such-host.invalid"}
            async with Server(config_for(checkpoint, blocks=(1, 4), **changes)) as server:
                assert server.address.host == "no-such-host.invalid"

    run_clean(run())
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "whether others can connect to no-such-host.invalid" in warning
