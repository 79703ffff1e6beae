"""What a client knows of its model's servers, for people."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from petals_core.errors import MissingBlocksError
from petals_core.identity import PeerId
from petals_core.routing.graph import Chain, describe_blocks, find_gaps

if TYPE_CHECKING:
    from petals_client.swarm import Swarm


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """One live server."""

    peer_id: PeerId
    public_name: str
    start: int
    end: int
    torch_dtype: str
    quantization: str
    version: str
    round_trip_s: float | None
    """None: not measured yet."""
    penalty_s: float
    """What its failures add to its cost at the moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientStatus:
    """A model's servers as this client sees them."""

    model: str
    fingerprint: str
    num_blocks: int
    coverage: tuple[int, ...]
    """For each block, how many live servers hold it."""
    chain: Chain
    """What a new session would use; empty if blocks are missing."""
    servers: tuple[ServerStatus, ...]

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """Ranges of blocks that no live server holds."""
        return tuple(find_gaps(((server.start, server.end) for server in self.servers), 0, self.num_blocks))

    def __str__(self) -> str:
        count = len(self.servers)
        servers = f"{count} server{'' if count == 1 else 's'}"
        lines = [f"{self.model} ({self.fingerprint[:12]}): {self.num_blocks} blocks, {servers}"]
        for server in self.servers:
            measured = "not measured" if server.round_trip_s is None else f"{1000 * server.round_trip_s:.1f} ms"
            weights = server.torch_dtype if server.quantization == "none" else server.quantization
            name = f"  {server.public_name}" if server.public_name else ""
            lines.append(
                f"  {server.peer_id.short}  blocks {server.start}:{server.end}  {weights}  round trip {measured}{name}"
            )
        if self.missing:
            lines.append(f"missing: {describe_blocks(self.missing)}")
        else:
            hops = " -> ".join(f"{hop.peer_id.short} {hop.start}:{hop.end}" for hop in self.chain)
            lines.append(f"chain: {hops}")
        return "\n".join(lines)


async def read_status(swarm: Swarm) -> ClientStatus:
    """Look a model's servers up and plan a chain.

    Raises:
        NoPeersError: no peer of the swarm answers.
    """
    await swarm.directory.refresh()
    try:
        chain, _ = await swarm.plan(0, swarm.num_blocks)
    except MissingBlocksError:
        chain = ()
    now_s = asyncio.get_running_loop().time()
    servers = tuple(
        ServerStatus(
            peer_id=signed.peer_id,
            public_name=signed.announcement.public_name,
            start=signed.announcement.start,
            end=signed.announcement.end,
            torch_dtype=signed.announcement.torch_dtype,
            quantization=signed.announcement.quantization,
            version=signed.announcement.version,
            round_trip_s=swarm.round_trip_s(signed.peer_id),
            penalty_s=swarm.health.penalty_s(signed.peer_id, now_s=now_s),
        )
        for signed in sorted(
            (await swarm.directory.servers()).values(),
            key=lambda each: (each.announcement.start, each.announcement.end, each.peer_id),
        )
    )
    return ClientStatus(
        model=swarm.model_name,
        fingerprint=swarm.fingerprint,
        num_blocks=swarm.num_blocks,
        coverage=tuple(
            sum(server.start <= block < server.end for server in servers) for block in range(swarm.num_blocks)
        ),
        chain=chain,
        servers=servers,
    )
