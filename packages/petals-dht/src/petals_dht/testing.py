"""Swarms of real nodes in one process, on loopback, for tests and benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from petals_core.addresses import Address
from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.identity import Identity
from petals_core.net.listener import Listener
from petals_core.net.stream import Stream
from petals_core.swarm_key import SwarmKey
from petals_core.wire.messages import Info
from petals_dht.directory import Directory
from petals_dht.node import NodeTiming
from petals_dht.protocol import Reach
from petals_dht.responder import NodeLimits
from petals_dht.storage import StorageLimits

FINGERPRINT = "f" * 64


def make_announcement(
    identity: Identity | None = None, *, now_s: float | None = None, **fields: Any
) -> SignedAnnouncement:
    """A signed announcement; what is not given takes a plain value."""
    now_s = time.time() if now_s is None else now_s
    content: dict[str, Any] = {
        "model_name": "test-model",
        "fingerprint": FINGERPRINT,
        "num_blocks": 12,
        "start": 0,
        "end": 4,
        "addresses": (Address("127.0.0.1", 31330),),
        "state": "online",
        "torch_dtype": "float32",
        "issued_at_s": now_s,
        "expires_at_s": now_s + 300,
    }
    return SignedAnnouncement.sign(Announcement(**{**content, **fields}), identity or Identity.ephemeral())


def make_info(signed: SignedAnnouncement, **fields: Any) -> Info:
    """What a server answers that is what it announced; what is not announced takes a plain value."""
    announced = signed.announcement
    content: dict[str, Any] = {
        "model_name": announced.model_name,
        "fingerprint": announced.fingerprint,
        "num_blocks": announced.num_blocks,
        "start": announced.start,
        "end": announced.end,
        "state": announced.state,
        "torch_dtype": announced.torch_dtype,
        "quantization": announced.quantization,
        "version": announced.version,
        "public_name": announced.public_name,
        "cache_tokens_left": 4096 if announced.cache_tokens_left is None else announced.cache_tokens_left,
        "num_sessions": 0,
    }
    return Info(**{**content, **fields})


class StubServer:
    """A server without a model: it announces itself once, listens, and says what it is to whoever asks."""

    def __init__(self, directory: Directory, listener: Listener, signed: SignedAnnouncement, info: Info) -> None:
        self.directory = directory
        self.listener = listener
        self.signed = signed
        self.info = info

    @classmethod
    async def start(cls, peers: list[Address], *, host: str = "127.0.0.1", **fields: Any) -> Self:
        """Join by ``peers`` and announce ``fields``; where nothing is given, plain values."""
        directory = await Directory.connect(peers)

        async def answer(stream: Stream) -> None:
            await stream.receive(timeout_s=None)
            await stream.send(server.info, end=True)

        listener = await Listener.start(identity=directory.identity, handler=answer, host=host)
        signed = make_announcement(directory.identity, addresses=(Address(host, listener.port),), **fields)
        server = cls(directory, listener, signed, make_info(signed))
        await directory.announce(signed)
        return server

    async def leave(self) -> None:
        """Tell that it leaves, and leave."""
        await self.directory.withdraw(self.signed)
        await self.vanish()

    async def vanish(self) -> None:
        """End without a word."""
        await self.listener.close()
        await self.directory.close()


@contextlib.asynccontextmanager
async def start_swarm(
    num_nodes: int,
    *,
    host: str = "127.0.0.1",
    swarm_key: SwarmKey | None = None,
    timing: NodeTiming | None = None,
    reach: Reach | None = None,
    clock: Callable[[], float] = time.time,
    skew_s: float = 0.0,
    limits: NodeLimits | None = None,
    storage_limits: StorageLimits | None = None,
) -> AsyncIterator[list[Directory]]:
    """Run so many nodes that all join by the first one. Their clocks differ by up to ``skew_s``."""

    async def start(number: int, initial_peers: list[Address]) -> Directory:
        offset_s = skew_s * (number / max(1, num_nodes - 1) - 0.5)
        return await Directory.start(
            Identity.ephemeral(),
            host,
            swarm_key=swarm_key,
            initial_peers=initial_peers,
            timing=timing,
            reach=reach,
            limits=limits,
            storage_limits=storage_limits,
            clock=lambda: clock() + offset_s,
        )

    directories = [await start(0, [])]
    try:
        peers = [Address(host, directories[0].port)]
        directories += await asyncio.gather(*(start(number, peers) for number in range(1, num_nodes)))
        yield directories
    finally:
        await asyncio.gather(*(directory.close() for directory in directories))
