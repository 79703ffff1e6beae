"""A swarm in this process: real servers, sockets and directory on the loopback device, with tiny models."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers

import petals_client
from petals_core.addresses import Address
from petals_core.identity import Identity
from petals_core.net.loop import new_event_loop
from petals_core.swarm_key import SwarmKey
from petals_core.testing.factories import make_checkpoint
from petals_dht.directory import Directory
from petals_server.config import ServerConfig
from petals_server.server import Server

T = TypeVar("T")


class InProcessSwarm:
    """A bootstrap node and servers in an event loop of their own thread. Everything ends with ``close``."""

    def __init__(self, *, swarm_key: SwarmKey | None = None) -> None:
        self.swarm_key = swarm_key
        self.servers: list[Server] = []
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="swarm")
        self._thread.start()
        self._bootstrap = self.run(Directory.start(Identity.ephemeral(), "127.0.0.1", swarm_key=swarm_key))
        self.initial_peers = [str(Address("127.0.0.1", self._bootstrap.port))]

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run something in the servers' loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=60)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start something in the servers' loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def add(self, model: Path, start: int, end: int, **settings: Any) -> Server:
        """Start a server of blocks ``start:end`` that computes in float32 with one thread."""
        settings = {"cache_tokens": 16_384, "num_threads": 1, **settings}
        config = ServerConfig(
            model=str(model),
            blocks=(start, end),
            host="127.0.0.1",
            port=0,
            identity=Identity.ephemeral(),
            swarm_key=self.swarm_key,
            initial_peers=tuple(map(Address.parse, self.initial_peers)),
            **settings,
        )
        server = self.run(Server.start(config))
        self.servers.append(server)
        return server

    def remove(self, server: Server) -> None:
        """Stop a server at once."""
        self.servers.remove(server)
        self.run(server.stop(drain_timeout_s=0.0))

    @property
    def num_sessions(self) -> int:
        """Sessions that are open on all servers together."""
        return sum(server.num_sessions for server in self.servers)

    def wait_for_sessions(self, count: int) -> None:
        """Wait until so many sessions are open; closing one is told to the servers without waiting for them."""

        async def wait() -> None:
            async with asyncio.timeout(10):
                while self.num_sessions != count:  # noqa: ASYNC110  # servers have no event for it
                    await asyncio.sleep(0)

        self.run(wait())

    def close(self) -> None:
        for server in list(self.servers):
            self.remove(server)
        self.run(self._bootstrap.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny float32 checkpoint of six blocks, made once for each family, or the demo model's."""
    made: dict[str, Path] = {"demo": DEMO}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(tmp_path_factory.mktemp("models") / f"tiny-{family}", family, num_blocks=6)
        return made[family]

    return get


@pytest.fixture
def new_swarm() -> Iterator[Callable[..., InProcessSwarm]]:
    """Make an empty swarm that ends with the test."""
    made: list[InProcessSwarm] = []

    def make(**settings: Any) -> InProcessSwarm:
        made.append(InProcessSwarm(**settings))
        return made[-1]

    yield make
    for swarm in made:
        swarm.close()


@pytest.fixture(scope="session")
def shared_swarm(checkpoints: Callable[[str], Path]) -> Iterator[Callable[[str], InProcessSwarm]]:
    """Return a swarm of three servers of unequal spans for a family, for tests that leave it as it is."""
    made: dict[str, InProcessSwarm] = {}

    def get(family: str) -> InProcessSwarm:
        if family not in made:
            swarm = made[family] = InProcessSwarm()
            for start, end in ((0, 1), (1, 4), (4, 8 if family == "demo" else 6)):
                swarm.add(checkpoints(family), start, end, torch_dtype="float32")
        return made[family]

    yield get
    for swarm in made.values():
        swarm.close()


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model whose blocks are remote, and the same as Transformers loads it, both in float32."""

    model: Any
    local: Any
    folder: Path
    swarm: InProcessSwarm

    @property
    def both(self) -> tuple[Any, Any]:
        return self.model, self.local


@pytest.fixture(scope="session")
def pairs(
    shared_swarm: Callable[[str], InProcessSwarm], checkpoints: Callable[[str], Path]
) -> Iterator[Callable[..., Pair]]:
    """Return a family's pair, made once for each family and kind of model."""
    made: dict[tuple[str, str], Pair] = {}

    def get(family: str, kind: str = "ModelForCausalLM") -> Pair:
        if (family, kind) not in made:
            folder, swarm = checkpoints(family), shared_swarm(family)
            torch.manual_seed(0)  # for heads that the checkpoint lacks
            model = getattr(petals_client, f"AutoDistributed{kind}").from_pretrained(
                folder, initial_peers=swarm.initial_peers, dtype=torch.float32
            )
            local = getattr(transformers, f"Auto{kind}").from_pretrained(folder, dtype=torch.float32).eval()
            made[family, kind] = Pair(model=model, local=local, folder=folder, swarm=swarm)
        return made[family, kind]

    yield get
    for pair in made.values():
        pair.model.close()
