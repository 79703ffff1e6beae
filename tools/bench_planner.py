"""How long a client plans: ``python3 tools/bench_planner.py``.

Draws servers at random places of a plane (up to 100 ms from end to end), with random spans and speeds, each of which
announces the delays to the eight nearest of those that may come next; the client sits in the middle. Prints the median
and the 90th percentile of planning a chain, from the client to itself or between two servers, and of that with the
weighing of all announcements before it, for short, middling and long spans; the same for dividing a batch among
chains; and what the announced delays are worth: the true time of a step through the chosen chain, against that of a
chain chosen without them. Nothing is cached between the plans. At the end it prints how 60 clients share three equal
servers.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import environment

if TYPE_CHECKING:
    from petals_core.announcement import Announcement
    from petals_core.identity import PeerId
    from petals_core.routing.graph import Chain, Server

SHAPES = ((4, 12), (16, 48), (64, 126))
"""Blocks of a server, from and to, as parts of 126."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One server of the made-up swarm."""

    peer_id: PeerId
    announcement: Announcement
    at: tuple[float, float]
    """Seconds one way, from the client in the middle."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=126, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="plans of each kind (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def make_places(rng: random.Random, num_servers: int, num_blocks: int, shape: tuple[int, int]) -> list[Place]:
    """Servers that together hold all blocks, some several times."""
    from petals_core.announcement import Announcement
    from petals_core.identity import PeerId
    from petals_core.limits import MAX_NEXT_DELAYS
    from petals_core.next_delays import NextDelays

    places: list[Place] = []
    for number in range(num_servers):
        length = max(1, min(num_blocks, rng.randint(*shape) * num_blocks // 126))
        start = number * num_blocks // num_servers if number % 2 else rng.randint(0, num_blocks - length)
        start = min(start, num_blocks - length)
        announcement = Announcement(
            model_name="model",
            fingerprint="f" * 64,
            num_blocks=num_blocks,
            start=start,
            end=start + length,
            addresses=(),
            state="online",
            torch_dtype="bfloat16",
            issued_at_s=0.0,
            expires_at_s=100.0,
            inference_tokens_per_s=rng.uniform(500, 2000) / length,
            forward_tokens_per_s=rng.uniform(50_000, 200_000) / length,
            load=rng.uniform(0, 2),
            cache_tokens_left=rng.randrange(100_000),
        )
        at = (rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05))
        places.append(Place(peer_id=PeerId(rng.randbytes(32)), announcement=announcement, at=at))

    def announce(place: Place) -> Place:
        own = place.announcement
        nearest = sorted(
            (math.dist(place.at, other.at), other.peer_id.digest)
            for other in places
            if own.start < other.announcement.start <= own.end < other.announcement.end
        )[:MAX_NEXT_DELAYS]
        delays = NextDelays.of((digest, delay_s) for delay_s, digest in nearest)
        return replace(place, announcement=replace(own, next_delays=delays))

    return [announce(place) for place in places]


def weigh(
    places: Sequence[Place], rng: random.Random, *, batch_tokens: int | None = None, num_sessions: int | None = None
) -> list[Server]:
    """What a client does for every plan."""
    from petals_core.routing.cost import estimate_cost

    return [
        estimate_cost(
            place.announcement,
            place.peer_id,
            round_trip_s=2 * math.hypot(*place.at),
            penalty_s=0.0,
            cache_tokens=2048,
            batch_tokens=batch_tokens,
            num_sessions=num_sessions,
            noise=rng.random(),
        )
        for place in places
    ]


def step_s(chain: Chain, places: Sequence[Place]) -> float:
    """What a step through a ring takes in truth: delays and computing."""
    by_peer = {place.peer_id: place for place in places}
    stops = [(0.0, 0.0), *(by_peer[hop.peer_id].at for hop in chain), (0.0, 0.0)]
    delays_s = sum(math.dist(one, two) for one, two in itertools.pairwise(stops))
    servers = {server.peer_id: server for server in weigh(places, random.Random(0))}
    return delays_s + sum((hop.end - hop.start) * servers[hop.peer_id].block_s for hop in chain)


def measure(work: Callable[[], object], repeats: int) -> str:
    """Median and 90th percentile in milliseconds."""
    times_ms = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        work()
        times_ms.append(1000 * (time.perf_counter() - started_s))
    return f"{statistics.median(times_ms):6.2f} ms, 90 % within {statistics.quantiles(times_ms, n=10)[-1]:6.2f} ms"


def run(options: argparse.Namespace) -> None:
    from petals_core.next_delays import NextDelays
    from petals_core.routing.flow import split_flow
    from petals_core.routing.planner import plan_chain

    rng = random.Random(options.seed)
    end = options.blocks
    print(f"{options.servers} servers, {end} blocks")
    for shape in SHAPES:
        places = make_places(rng, options.servers, end, shape)

        def plan(places: Sequence[Place] = places) -> Chain:
            return plan_chain(weigh(places, rng), 0, end, model_name="model")

        def split(places: Sequence[Place] = places) -> object:
            servers = weigh(places, rng, batch_tokens=512)
            return split_flow(servers, 0, end, model_name="model", max_chains=4)

        servers = weigh(places, rng)

        def plan_weighed(servers: Sequence[Server] = servers) -> Chain:
            return plan_chain(servers, 0, end, model_name="model")

        def plan_between(servers: Sequence[Server] = servers) -> Chain:
            return plan_chain(servers, 0, end, model_name="model", previous=servers[0], following=servers[1])

        blind = [replace(each, announcement=replace(each.announcement, next_delays=NextDelays())) for each in places]
        known_ms = 1000 * statistics.median(step_s(plan(), places) for _ in range(5))
        blind_ms = 1000 * statistics.median(step_s(plan(blind), places) for _ in range(5))
        print(f"spans of {shape[0]} to {shape[1]} blocks: a chain of {len(plan())} servers")
        print(f"  planning a chain                {measure(plan_weighed, options.repeats)}")
        print(f"  the same between two servers    {measure(plan_between, options.repeats)}")
        print(f"  weighing and planning a chain   {measure(plan, options.repeats)}")
        print(f"  dividing a batch among chains   {measure(split, options.repeats)}")
        print(f"  a step through the chain        {known_ms:.0f} ms; {blind_ms:.0f} ms if no delays are announced")


def spread(seed: int, *, num_clients: int = 60, num_servers: int = 3, lag: int = 5) -> float:
    """Largest over mean number of sessions, when clients come one after another and plan for themselves.

    Servers are equal but for what measuring blurs; the sessions of the last ``lag`` clients may still be on their way.
    """
    from petals_core.routing.planner import plan_chain

    rng = random.Random(seed)
    (first, *_) = make_places(rng, 1, 8, (126, 126))
    places = [replace(first, peer_id=type(first.peer_id)(rng.randbytes(32))) for _ in range(num_servers)]
    chosen: list[PeerId] = []
    for _ in range(num_clients):
        seen = Counter(chosen[: max(0, len(chosen) - rng.randint(0, lag))])
        servers = []
        for place in places:
            blurred = replace(
                place.announcement,
                inference_tokens_per_s=(place.announcement.inference_tokens_per_s or 0.0) * rng.uniform(0.97, 1.03),
                load=0.0,
            )
            servers += weigh([replace(place, announcement=blurred)], rng, num_sessions=seen[place.peer_id])
        (hop,) = plan_chain(servers, 0, 8, model_name="model")
        chosen.append(hop.peer_id)
    return max(Counter(chosen).values()) * num_servers / num_clients


def main() -> int:
    options = parse()
    environment.enter()
    run(options)
    ratios = [spread(seed) for seed in range(10)]
    print(
        f"60 clients over three equal servers, seeds 0 to 9: largest over mean {min(ratios):.2f} to {max(ratios):.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
