"""Swarms of real nodes in one process, on loopback, for tests and benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from petals_core.addresses import Address
from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.identity import Identity
from petals_core.swarm_key import SwarmKey
from petals_dht.directory import Directory
from petals_dht.node import NodeTiming
from petals_dht.protocol import Reach

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


@contextlib.asynccontextmanager
async def start_swarm(
    num_nodes: int,
    *,
    host: str = "127.0.0.1",
    swarm_key: SwarmKey | None = None,
    timing: NodeTiming | None = None,
    reach: Reach | None = None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[list[Directory]]:
    """Run so many nodes that all join by the first one."""

    async def start(initial_peers: list[Address]) -> Directory:
        return await Directory.start(
            Identity.ephemeral(),
            host,
            swarm_key=swarm_key,
            initial_peers=initial_peers,
            timing=timing,
            reach=reach,
            clock=clock,
        )

    directories = [await start([])]
    try:
        peers = [Address(host, directories[0].port)]
        directories += await asyncio.gather(*(start(peers) for _ in range(num_nodes - 1)))
        yield directories
    finally:
        await asyncio.gather(*(directory.close() for directory in directories))
