"""For tests: a client as small as can be, to say to a server whatever is wanted, and a swarm within this process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from petals_core.addresses import Address
from petals_core.errors import PetalsError
from petals_core.identity import Identity
from petals_core.net.dialer import Dialer, PeerConnection
from petals_core.net.loop import new_event_loop
from petals_core.net.rpc import call
from petals_core.net.stream import Stream
from petals_core.swarm_key import SwarmKey
from petals_core.tensors.codec import Encoding, TensorSpec, decode, encode
from petals_core.wire.frames import Priority
from petals_core.wire.messages import (
    Forward,
    ForwardResult,
    Info,
    InfoRequest,
    Message,
    OpenSession,
    SessionOpened,
    Step,
    StepResult,
)
from petals_dht.directory import Directory
from petals_server.config import PlacementTiming, ServerConfig
from petals_server.server import Server

TIMEOUT_S = 30.0
T = TypeVar("T")


def config_for(model: Path, /, **changes: Any) -> ServerConfig:
    """A server of all blocks on this machine that takes little time to start."""
    config = ServerConfig(
        model=str(model),
        identity=Identity.ephemeral(),
        port=0,
        num_threads=1,
        cache_tokens=1000,
        placement=PlacementTiming(interval_s=3600.0, settle_s=0.2),
    )
    return replace(config, **changes)


def random_states(num_rows: int, num_tokens: int, seed: int = 0, hidden_size: int = 64) -> torch.Tensor:
    """Hidden states [R, N, H]."""
    return torch.randn(num_rows, num_tokens, hidden_size, generator=torch.Generator().manual_seed(seed))


class Client:
    """Requests to one server."""

    def __init__(self, server: Server, connection: PeerConnection, identity: Identity) -> None:
        self.server = server
        self.identity = identity
        self.connection = connection

    async def info(self) -> Info:
        message = await call(self.connection, InfoRequest(), reply=Info, timeout_s=TIMEOUT_S)
        assert isinstance(message.body, Info)
        return message.body

    async def open(self, num_rows: int = 1, max_length: int = 64, **changes: Any) -> Session:
        """Open a session; ``changes`` go into the request."""
        stream = self.connection.open_stream(Priority.DECODE)
        request = OpenSession(
            session_id=os.urandom(16),
            fingerprint=self.server.model.fingerprint,
            start=self.server.model.span.start,
            end=self.server.model.span.end,
            num_rows=num_rows,
            max_length=max_length,
            deadline_ms=10_000,
        )
        await stream.send(replace(request, **changes))
        opened = (await stream.receive(timeout_s=TIMEOUT_S)).body
        assert isinstance(opened, SessionOpened)
        return Session(stream, opened)

    async def forward(self, rows: Sequence[torch.Tensor], **changes: Any) -> list[torch.Tensor]:
        """Rows [N, H] of any lengths through the blocks."""
        spec, buffers = encode(torch.cat(list(rows)))
        request = Forward(
            fingerprint=self.server.model.fingerprint,
            start=self.server.model.span.start,
            end=self.server.model.span.end,
            row_tokens=tuple(len(row) for row in rows),
            tensors=(spec.to_wire(),),
            deadline_ms=10_000,
        )
        message = await call(
            self.connection, replace(request, **changes), buffers, reply=ForwardResult, timeout_s=TIMEOUT_S
        )
        return _rows(message, rows)


class Session:
    """An open session."""

    def __init__(self, stream: Stream, opened: SessionOpened) -> None:
        self.stream = stream
        self.opened = opened
        self.num_columns = 0
        self.num_steps = 0
        self.attempt = 0
        self.last_result: StepResult | None = None

    async def step(
        self,
        rows: Sequence[torch.Tensor],
        *,
        keep: int | None = None,
        encoding: Encoding | None = None,
        payload: Sequence[memoryview] | None = None,
        **changes: Any,
    ) -> list[torch.Tensor]:
        """Append rows [N, H] of any lengths; ``changes`` go into the request."""
        spec, buffers = encode(torch.cat(list(rows)), encoding=encoding)
        keep = self.num_columns if keep is None else keep
        request = Step(
            step=self.num_steps,
            attempt=self.attempt,
            keep=keep,
            row_tokens=tuple(len(row) for row in rows),
            tensors=(spec.to_wire(),),
            deadline_ms=10_000,
        )
        self.num_steps += 1
        await self.stream.send(replace(request, **changes), buffers if payload is None else payload)
        try:
            message = await self.stream.receive(timeout_s=TIMEOUT_S)
        except PetalsError:
            self.attempt += 1
            raise
        self.num_columns = keep + max(len(row) for row in rows)
        result = _rows(message, rows)
        assert isinstance(message.body, StepResult)
        self.last_result = message.body
        return result


def _rows(message: Message, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The states of a reply, of as many tokens per row as were sent."""
    assert isinstance(message.body, (StepResult, ForwardResult))
    result = decode(TensorSpec.from_wire(message.body.tensors[0]), message.received_payload)
    return list(result.split([len(row) for row in rows]))


@asynccontextmanager
async def served(model: Path, /, **changes: Any) -> AsyncIterator[Client]:
    """A running server and a client connected to it; ``changes`` go into the configuration."""
    async with Server(config_for(model, **changes)) as server, connected(server) as client:
        yield client


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Client]:
    """A client of its own identity, connected to a server."""
    identity = Identity.ephemeral()
    dialer = Dialer(identity=identity)
    try:
        yield Client(server, await dialer.connect([server.address], peer_id=server.peer_id), identity)
    finally:
        await dialer.close()


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until something has happened."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 -- anything may be waited for
            await asyncio.sleep(0.002)


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

    async def _stop_all(self) -> None:
        servers, self.servers = self.servers, []
        await asyncio.gather(*(server.stop(drain_timeout_s=0.0) for server in servers))

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
        # Together, because each says goodbye to the others, and would wait for those that are gone.
        self.run(self._stop_all())
        self.run(self._bootstrap.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
