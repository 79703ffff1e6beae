"""How long a look-up in the directory takes: real UDP nodes on loopback, all in this process.

    python tools/bench_directory.py --nodes 300 --announcements 100

Every node joins by the first one, servers announce one model, and then new clients join and look it up, one after the
other. The times contain what all those nodes compute, since they share one core here.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass

from petals_core.addresses import Address
from petals_core.identity import Identity
from petals_core.limits import MAX_DATAGRAM_BYTES
from petals_core.net.loop import run
from petals_core.swarm_key import SwarmKey
from petals_dht.directory import Directory
from petals_dht.testing import FINGERPRINT, make_announcement, start_swarm

_CONCURRENT_ANNOUNCEMENTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LookUp:
    """What one new client met."""

    join_s: float
    first_s: float
    again_s: float
    num_found: int


async def look_up(peer: Address, swarm_key: SwarmKey | None) -> LookUp:
    started_at_s = time.perf_counter()
    async with await Directory.connect([peer], swarm_key=swarm_key) as client:
        joined_at_s = time.perf_counter()
        found = await client.find_servers(FINGERPRINT)
        found_at_s = time.perf_counter()
        await client.find_servers(FINGERPRINT)
        return LookUp(
            join_s=joined_at_s - started_at_s,
            first_s=found_at_s - joined_at_s,
            again_s=time.perf_counter() - found_at_s,
            num_found=len(found),
        )


async def bench(num_nodes: int, num_announcements: int, num_clients: int, swarm_key: SwarmKey | None) -> None:
    room = asyncio.Semaphore(_CONCURRENT_ANNOUNCEMENTS)

    async def announce(directory: Directory, number: int) -> tuple[float, int]:
        signed = make_announcement(Identity.ephemeral(), public_name=f"server {number}", version="0.1.0")
        async with room:
            started_at_s = time.perf_counter()
            num_kept = await directory.announce(signed)
            return time.perf_counter() - started_at_s, num_kept

    started_at_s = time.perf_counter()
    async with start_swarm(num_nodes, swarm_key=swarm_key) as swarm:
        print(f"{num_nodes} nodes joined in {time.perf_counter() - started_at_s:.2f} s")
        announced = await asyncio.gather(
            *(announce(swarm[number % num_nodes], number) for number in range(num_announcements))
        )
        print(
            f"{num_announcements} announcements of {len(make_announcement().encoded)} bytes: "
            f"median {statistics.median(seconds for seconds, _ in announced) * 1e3:.0f} ms each, "
            f"kept by at least {min(num_kept for _, num_kept in announced)} nodes"
        )
        peer = Address("127.0.0.1", swarm[0].port)
        results = [await look_up(peer, swarm_key) for _ in range(num_clients)]
        largest = max(each.node.protocol.max_sent_bytes for each in swarm)
    for name in ("join_s", "first_s", "again_s"):
        times = sorted(getattr(result, name) * 1e3 for result in results)
        title = {"join_s": "join", "first_s": "first look-up", "again_s": "second look-up"}[name]
        print(f"{title:14} median {statistics.median(times):6.1f} ms, slowest of {num_clients} {times[-1]:6.1f} ms")
    print(f"found          {min(result.num_found for result in results)} of {num_announcements}")
    print(f"largest datagram {largest} bytes of {MAX_DATAGRAM_BYTES}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=300)
    parser.add_argument("--announcements", type=int, default=100)
    parser.add_argument("--clients", type=int, default=9, help="new clients that look up, one after the other")
    parser.add_argument("--private", action="store_true", help="with a swarm key")
    options = parser.parse_args()
    swarm_key = SwarmKey.generate() if options.private else None
    run(bench(options.nodes, options.announcements, options.clients, swarm_key))


if __name__ == "__main__":
    main()
