"""What the directory does with many: real UDP nodes on loopback, all in this process.

    python tools/bench_directory.py --nodes 300 --servers 100
    python tools/bench_directory.py --nodes 1000 --servers 10000 --models 100 --leave --hostile
    python tools/bench_directory.py --nodes 300 --servers 10000 --models 1 --clients 3

Every node joins by the first one, servers announce their models, and then new clients join by any node and look one
model up, one after the other. ``--leave`` closes half of the nodes at once and looks up again; ``--hostile`` throws
garbage and forged announcements at one node; ``--skew-s`` lets the nodes' clocks differ. The times contain what all
those nodes compute, since they share one core here.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from petals_core.addresses import Address
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import NoPeersError
from petals_core.identity import Identity
from petals_core.limits import MAX_DATAGRAM_BYTES
from petals_core.net.loop import run
from petals_core.swarm_key import SwarmKey
from petals_dht import messages
from petals_dht.contacts import Contact, model_key
from petals_dht.datagrams import Datagram, DatagramSeal, Kind, ReplayWindow
from petals_dht.directory import Directory
from petals_dht.messages import Store
from petals_dht.node import Node
from petals_dht.rates import Rate
from petals_dht.responder import NodeLimits
from petals_dht.shards import ENOUGH_SERVERS
from petals_dht.sockets import bind_udp
from petals_dht.storage import StorageLimits
from petals_dht.testing import make_announcement, start_swarm

_CONCURRENT_ANNOUNCEMENTS = 8
_REFRESH_S = 40.0
"""How often servers announce themselves."""
_BURST = 50
_LIFETIME_S = 1700.0
_LOOK_UP_TIMEOUT_S = 60.0
_SHORT_LIFETIME_S = 20.0
_NO_LIMIT = Rate(per_s=1e9, burst=1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class LookUp:
    """What one new client met."""

    join_s: float
    first_s: float
    again_s: float
    part_s: float
    num_found: int
    num_part: int


def fingerprint(model: int) -> str:
    return hashlib.sha256(f"model {model}".encode()).hexdigest()


async def look_up(peer: Address, swarm_key: SwarmKey | None, wanted: str) -> LookUp:
    started_at_s = time.perf_counter()
    async with await Directory.connect([peer], swarm_key=swarm_key) as client:
        joined_at_s = time.perf_counter()
        found = await client.find_servers(wanted, timeout_s=_LOOK_UP_TIMEOUT_S)
        found_at_s = time.perf_counter()
        await client.find_servers(wanted, timeout_s=_LOOK_UP_TIMEOUT_S)
        found_again_at_s = time.perf_counter()
        part = await client.find_servers(wanted, wanted=ENOUGH_SERVERS)
        return LookUp(
            join_s=joined_at_s - started_at_s,
            first_s=found_at_s - joined_at_s,
            again_s=found_again_at_s - found_at_s,
            part_s=time.perf_counter() - found_again_at_s,
            num_found=len(found),
            num_part=len(part),
        )


class Bench:
    """A swarm and its servers, each with an identity of its own on one of the nodes."""

    def __init__(self, swarm: Sequence[Directory], options: argparse.Namespace, swarm_key: SwarmKey | None) -> None:
        self.swarm = list(swarm)
        self.options = options
        self.swarm_key = swarm_key
        self._random = random.Random(0)
        self._servers = [
            Directory(swarm[number % len(swarm)].node, Identity.ephemeral()) for number in range(options.servers)
        ]

    def peer(self) -> Address:
        return Address("127.0.0.1", self._random.choice(self.swarm).port)

    def _traffic(self) -> tuple[int, int]:
        protocols = [each.node.protocol for each in self.swarm]
        return sum(each.num_sent for each in protocols), sum(each.sent_bytes for each in protocols)

    def _sign(self, number: int, directory: Directory, lifetime_s: float = _LIFETIME_S) -> SignedAnnouncement:
        now_s = directory.node.clock()
        model = number % self.options.models
        return make_announcement(
            directory.identity,
            now_s=now_s,
            expires_at_s=now_s + lifetime_s,
            model_name=f"model-{model}",
            fingerprint=fingerprint(model),
            public_name=f"server {number}",
            version="0.1.0",
            start=4 * (number // self.options.models % 3),
            end=4 * (number // self.options.models % 3) + 4,
        )

    async def announce(self, title: str, count: int) -> None:
        """Let the first ``count`` servers announce themselves, and say what it took."""
        room, num_failed = asyncio.Semaphore(_CONCURRENT_ANNOUNCEMENTS), 0

        async def announce(number: int) -> tuple[float, int]:
            nonlocal num_failed
            directory = self._servers[number]
            async with room:
                started_at_s = time.perf_counter()
                while True:
                    try:
                        num_kept = await directory.announce(self._sign(number, directory))
                        return time.perf_counter() - started_at_s, num_kept
                    except NoPeersError:
                        # A server tries again, too. A pause of the whole process lets all that is under way time out.
                        num_failed += 1

        before, started_at_s = self._traffic(), time.perf_counter()
        outcomes = await asyncio.gather(*(announce(number) for number in range(count)))
        after = self._traffic()
        print(
            f"{title}: {count} servers of {self.options.models} models in {time.perf_counter() - started_at_s:.1f} s, "
            f"median {statistics.median(seconds for seconds, _ in outcomes) * 1e3:.0f} ms, "
            f"kept by at least {min(num_kept for _, num_kept in outcomes)} nodes; each took "
            f"{(after[0] - before[0]) / count:.0f} datagrams of all nodes and "
            f"{(after[1] - before[1]) / count / 1e3:.1f} kB, "
            f"{(after[1] - before[1]) / count / _REFRESH_S:.0f} B/s at one in {_REFRESH_S:.0f} s; "
            f"{num_failed} tried again"
        )

    async def look_up(self, title: str) -> None:
        wanted = [self._random.randrange(self.options.models) for _ in range(self.options.clients)]
        results = [await look_up(self.peer(), self.swarm_key, fingerprint(model)) for model in wanted]
        for name, what in (("join_s", "join"), ("first_s", "first look-up"), ("again_s", "second look-up")):
            times = sorted(getattr(result, name) * 1e3 for result in results)
            print(f"{title}: {what:14} median {statistics.median(times):7.1f} ms, slowest {times[-1]:7.1f} ms")
        if self.options.servers > ENOUGH_SERVERS * self.options.models:
            fewest = min(result.num_part for result in results)
            times = sorted(result.part_s * 1e3 for result in results)
            print(
                f"{title}: what a client reads median {statistics.median(times):.1f} ms, slowest {times[-1]:.1f} ms; "
                f"at least {fewest} servers"
            )
        true = [len(range(model, self.options.servers, self.options.models)) for model in wanted]
        missed = sum(expected - result.num_found for expected, result in zip(true, results, strict=True))
        print(f"{title}: {sum(result.num_found for result in results)} found, {missed} missed")

    async def notice(self) -> None:
        """How long after a server began to announce itself a client that just joined knows it."""
        newcomer = Directory(self.swarm[0].node, Identity.ephemeral())
        started_at_s = time.perf_counter()
        announcing = asyncio.create_task(newcomer.announce(self._sign(0, newcomer)))
        while True:
            async with await Directory.connect([self.peer()], swarm_key=self.swarm_key) as client:
                found = await client.find_servers(fingerprint(0))
            if newcomer.identity.peer_id in {signed.peer_id for signed in found}:
                break
        print(f"a new announcement is seen by a new client after {time.perf_counter() - started_at_s:.2f} s")
        await announcing
        await newcomer.withdraw(self._sign(0, newcomer))

    async def expire(self) -> None:
        """How many clients that just joined see an announcement before and after it has expired."""
        newcomer = Directory(self.swarm[0].node, Identity.ephemeral())
        signed = self._sign(0, newcomer, _SHORT_LIFETIME_S + self.options.skew_s)
        await newcomer.announce(signed)
        counts: list[int] = []
        for _ in range(2):
            seen = 0
            for _ in range(self.options.clients):
                if time.time() >= signed.announcement.expires_at_s - 1.0 and not counts:
                    break
                async with await Directory.connect([self.peer()], swarm_key=self.swarm_key) as client:
                    found = await client.find_servers(fingerprint(0))
                seen += newcomer.identity.peer_id in {each.peer_id for each in found}
            counts.append(seen)
            await asyncio.sleep(max(0.0, signed.announcement.expires_at_s + self.options.skew_s - time.time()))
        print(f"an announcement that expires: {counts[0]} new clients saw it before, {counts[1]} afterwards")

    async def leave(self) -> None:
        """Close half of the nodes at once."""
        self._random.shuffle(self.swarm)
        leaving, self.swarm = self.swarm[::2], self.swarm[1::2]
        await asyncio.gather(*(each.close() for each in leaving))
        print(f"{len(leaving)} nodes left at once")

    def print_load(self) -> None:
        entries = [each.node.storage.num_entries for each in self.swarm]
        largest = max(each.node.protocol.max_sent_bytes for each in self.swarm)
        print(
            f"announcements on a node: median {statistics.median(entries):.0f}, most {max(entries)}, "
            f"{max(each.node.storage.total_bytes for each in self.swarm) / 2**20:.2f} MiB; "
            f"largest datagram {largest} bytes of {MAX_DATAGRAM_BYTES}"
        )


async def attack(num_garbage: int, num_forged: int) -> None:
    """Throw datagrams at one node whose limits per source are lifted, so that each of them is looked at."""
    limits = NodeLimits(request_rate=_NO_LIMIT, total_request_rate=_NO_LIMIT, store_rate=_NO_LIMIT)
    node = await Node.start(Identity.ephemeral(), "127.0.0.1", limits=limits)
    sock = bind_udp("127.0.0.1", 0)
    random_, process, target = random.Random(0), psutil.Process(), ("127.0.0.1", node.port)
    sender = random_.randbytes(20)
    seal = DatagramSeal(sender, None, ReplayWindow(started_at_s=0.0))
    client = await Node.start(Identity.ephemeral(), is_client=True, initial_peers=[Address(*target)])
    key = model_key(fingerprint(0))
    token = (await client.nearest_nodes(key))[0][1]
    true = make_announcement(fingerprint=fingerprint(0)).encoded

    def request(entry: bytes) -> bytes:
        body = messages.encode(Store(key=key, token=token, entry=entry))
        datagram = Datagram(
            kind=Kind.REQUEST,
            request_id=random_.randbytes(16),
            sender=sender,
            destination=node.protocol.own.id,
            is_client=True,
            body=body,
        )
        return seal.seal(datagram, now_s=0.0, nonce=bytes(12))

    def changed(content: bytes, first: int = 0) -> bytes:
        """One byte is another one."""
        position = random_.randrange(first, len(content))
        return content[:position] + bytes([content[position] ^ random_.randrange(1, 256)]) + content[position + 1 :]

    def garbage(number: int) -> bytes:
        return random_.randbytes(random_.randrange(1300)) if number % 2 else changed(request(changed(true)))

    async def throw(title: str, contents: Sequence[bytes]) -> None:
        before_bytes, started_at_s = process.memory_info().rss, time.perf_counter()
        for start in range(0, len(contents), _BURST):
            for content in contents[start : start + _BURST]:
                sock.sendto(content, target)
            # A round trip, so that the node has taken them all before the next ones come.
            await client.protocol.call_ping(Contact(node.protocol.own.id, *target))
        grown = (process.memory_info().rss - before_bytes) / 2**20
        took_s = time.perf_counter() - started_at_s
        print(
            f"{len(contents)} {title} in {took_s:.1f} s: {node.storage.num_entries} stored, "
            f"{len(node.protocol.router)} in the routing table, memory grown by {grown:.1f} MiB"
        )

    thrown = [garbage(number) for number in range(num_garbage)]
    await throw("hostile datagrams", thrown)
    del thrown
    await throw("forged announcements", [request(changed(true)) for _ in range(num_forged)])
    print(f"dropped: {dict(node.protocol.dropped)}, answered {node.protocol.num_requests} requests")
    sock.close()
    await client.close()
    await node.close()


async def bench(options: argparse.Namespace) -> None:
    swarm_key = SwarmKey.generate() if options.private else None
    started_at_s = time.perf_counter()
    # All nodes are behind one address here, so what one address may ask for is not to count.
    limits = NodeLimits(request_rate=_NO_LIMIT, store_rate=_NO_LIMIT)
    room = StorageLimits(max_entries_per_source=StorageLimits().max_entries_per_key)
    async with start_swarm(
        options.nodes, swarm_key=swarm_key, skew_s=options.skew_s, limits=limits, storage_limits=room
    ) as swarm:
        print(f"{options.nodes} nodes joined in {time.perf_counter() - started_at_s:.2f} s")
        run_ = Bench(swarm, options, swarm_key)
        await run_.announce("announced", options.servers)
        await run_.announce("again", min(options.servers, 200))
        run_.print_load()
        await run_.look_up("clients")
        await run_.notice()
        if options.leave:
            await run_.leave()
            await run_.look_up("after it")
        await run_.expire()  # last, because it takes so long that others expire too
    if options.hostile:
        await attack(100_000, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=300)
    parser.add_argument("--servers", "--announcements", type=int, default=100)
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--clients", type=int, default=9, help="new clients that look up, one after the other")
    parser.add_argument("--private", action="store_true", help="with a swarm key")
    parser.add_argument("--skew-s", type=float, default=0.0, help="clocks differ by up to so many seconds")
    parser.add_argument("--leave", action="store_true", help="close half of the nodes, and look up again")
    parser.add_argument("--hostile", action="store_true", help="throw 100,000 hostile datagrams at a node")
    run(bench(parser.parse_args()))


if __name__ == "__main__":
    main()
