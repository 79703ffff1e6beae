"""Which servers a client uses, and why, with real servers on loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_client.cli import app
from petals_client.swarm import Swarm
from petals_client.swarm_session import SwarmSession
from petals_core.errors import (
    ConfigurationError,
    DrainingError,
    InvalidRequestError,
    MissingBlocksError,
    RemoteFailureError,
)
from petals_core.models.checkpoint import Checkpoint
from petals_server.testing import InProcessSwarm

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT = torch.tensor([[5, 6, 7, 8]])
NUM_BLOCKS = 6


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama")


@pytest.fixture(scope="module")
def equal_swarm(folder: Path) -> Iterator[InProcessSwarm]:
    """Three servers of all blocks, for tests that leave them as they are."""
    swarm = InProcessSwarm()
    for _ in range(3):
        swarm.add(folder, 0, NUM_BLOCKS)
    yield swarm
    swarm.close()


def connect(folder: Path, swarm: InProcessSwarm, **settings: Any) -> Any:
    options = ClientOptions.make(initial_peers=swarm.initial_peers, **settings)
    return AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[], options=options)


def new_client(folder: Path, swarm: InProcessSwarm, seed: int = 0) -> Swarm:
    """What a client knows of the swarm, in the caller's event loop."""
    return Swarm(
        ClientOptions.make(initial_peers=swarm.initial_peers),
        model_name="tiny",
        fingerprint=Checkpoint.open(folder).fingerprint,
        num_blocks=NUM_BLOCKS,
        torch_dtype="float32",
        rng=random.Random(seed),
    )


def test_sixty_clients_share_equal_servers(folder: Path, equal_swarm: InProcessSwarm) -> None:
    async def run() -> list[Any]:
        clients, sessions = [], []
        for seed in range(60):
            clients.append(client := new_client(folder, equal_swarm, seed))
            session = SwarmSession(client, start=0, end=NUM_BLOCKS, num_rows=1, max_length=8)
            await session.open()
            sessions.append(session)
        chosen = [hop.peer_id for session in sessions for hop in session.chain]
        for session in sessions:
            session.close()
        await asyncio.gather(*(client.close() for client in clients))
        return chosen

    chosen = asyncio.run(run())
    assert len(chosen) == 60
    assert max(Counter(chosen).values()) <= 1.25 * 20
    equal_swarm.wait_for_sessions(0)


def test_a_ban_changes_the_very_next_plan_and_the_least_bad_is_tried(folder: Path, equal_swarm: InProcessSwarm) -> None:
    async def run() -> None:
        client = new_client(folder, equal_swarm)
        try:
            banned = []
            for _ in range(3):
                ((hop,), _) = await client.plan(0, NUM_BLOCKS)
                assert hop.peer_id not in banned
                client.blame(hop.peer_id, InvalidRequestError("the client's own mistake"))
                client.blame(hop.peer_id, DrainingError("it is about to stop"))
                assert client.health.penalty_s(hop.peer_id, now_s=asyncio.get_running_loop().time()) == 0.0
                banned.append(hop.peer_id)
                for _ in range(3 - len(banned) + 1):  # the last one is the least bad
                    client.blame(hop.peer_id, RemoteFailureError("broken"))
            ((hop,), _) = await client.plan(0, NUM_BLOCKS)
            assert hop.peer_id == banned[-1]
            client.praise(banned[0])
            ((hop,), _) = await client.plan(0, NUM_BLOCKS)
            assert hop.peer_id == banned[0]
            with pytest.raises(MissingBlocksError):
                await client.plan(0, NUM_BLOCKS, without=banned)
        finally:
            await client.close()

    asyncio.run(run())


def test_allowed_and_blocked_servers(folder: Path, equal_swarm: InProcessSwarm) -> None:
    one, two, three = (str(server.peer_id) for server in equal_swarm.servers)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=equal_swarm.initial_peers, allowed_servers=[one[:8], two], blocked_servers=two[:8]
    )
    route = model.explain_route()
    assert [str(hop.peer_id) for hop in route.chain] == [one]
    assert sorted(each.reason for each in route.alternatives) == [
        "not allowed: ids in blocked_servers",
        "not allowed: ids that allowed_servers lacks",
    ]
    model.close()
    refusing = connect(folder, equal_swarm, blocked_servers=(one, two, three))
    with pytest.raises(MissingBlocksError, match="only from servers with ids in blocked_servers, which this client's"):
        refusing.generate(PROMPT, max_new_tokens=1, **GREEDY)
    refusing.close()
    with pytest.raises(ConfigurationError, match="'nobody!' is not a peer id"):
        connect(folder, equal_swarm, allowed_servers=("nobody!",))


def test_a_route_is_explained(folder: Path, equal_swarm: InProcessSwarm, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["route", str(folder), "--initial-peers", equal_swarm.initial_peers[0]]
    app([*arguments, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    servers = {str(server.peer_id) for server in equal_swarm.servers}
    assert found["edges"][0]["from"] == found["edges"][-1]["to"] == "client"
    assert found["edges"][0]["to"] in servers
    assert {each["peer_id"] for each in found["alternatives"]} == servers - {found["edges"][0]["to"]}
    assert sum(edge["total_s"] for edge in found["edges"]) == pytest.approx(found["total_s"])
    blocked = found["edges"][0]["to"]
    app([*arguments, "--blocked-servers", blocked], standalone_mode=False)
    text = capsys.readouterr().out
    assert "measured" in text
    assert f"{blocked[:8]}" in text
    assert "not allowed: ids in blocked_servers" in text


def test_a_chain_works_when_every_bootstrap_node_is_gone(
    folder: Path, new_swarm: Callable[..., InProcessSwarm], pairs: Any
) -> None:
    swarm = new_swarm()
    for start, end in ((0, 3), (3, 6), (0, 6)):
        swarm.add(folder, start, end)
    model = connect(folder, swarm, refresh_s=0.0)
    local = pairs("llama").local
    expected = local.generate(PROMPT, max_new_tokens=8, **GREEDY)
    with model.inference_session(max_length=20):
        model.generate(PROMPT, max_new_tokens=2, **GREEDY)
        swarm.run(swarm._bootstrap.close())
        more = model.generate(None, max_new_tokens=6, **GREEDY)
    assert torch.equal(more[0], expected[0, -6:])
    # Every plan from now on looks the servers up anew, at nodes that are servers themselves.
    for _ in range(3):
        assert torch.equal(model.generate(PROMPT, max_new_tokens=8, **GREEDY), expected)
    model.remote_blocks.chain.run(lambda known: known.directory.refresh())
    model.close()


class Noticed(logging.Handler):
    """Knows when the client has said that it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "held by no live server" in record.getMessage():
            self.event.set()


def test_a_forward_waits_for_a_server_to_come(
    folder: Path, new_swarm: Callable[..., InProcessSwarm], pairs: Any
) -> None:
    swarm = new_swarm()
    swarm.add(folder, 0, 3)
    gone = swarm.add(folder, 3, 6)
    model = connect(folder, swarm)
    noticed = Noticed()
    logging.getLogger("petals_client").addHandler(noticed)

    def add() -> None:
        if noticed.event.wait(60):
            swarm.add(folder, 3, 6)

    adding = threading.Thread(target=add)
    try:
        with torch.no_grad():
            expected = pairs("llama").local(PROMPT).logits
            assert torch.allclose(model(PROMPT).logits, expected, atol=1e-4)
            swarm.remove(gone)  # the client does not know yet
            adding.start()
            assert torch.allclose(model(PROMPT).logits, expected, atol=1e-4)
            assert noticed.event.is_set()
    finally:
        noticed.event.set()
        adding.join()
        logging.getLogger("petals_client").removeHandler(noticed)
        model.close()
