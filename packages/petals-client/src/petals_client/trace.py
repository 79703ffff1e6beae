"""Where the time of a step went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from petals_core.identity import PeerId
from petals_core.routing.graph import Hop


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTrace:
    """One server's part of a step."""

    peer_id: PeerId
    start: int
    end: int
    queue_s: float
    """The server's claim: how long the request waited for its turn."""
    compute_s: float
    """The server's claim: how long it computed."""
    network_s: float
    """The way to it, and from the last server back, with the software on both sides: this server's share of what the
    trip took beside queues and computing. Clocks of different machines can't be compared, so it is shared out by the
    delays that the ends of each way have measured."""
    is_carried: bool = False
    """The states came by way of the client, because the server before can't reach this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """One step of a session through its chain."""

    num_tokens: int
    total_s: float
    """In the client's loop, from its coming there until its last part is back."""
    hops: tuple[HopTrace, ...]


def trace_trip(
    chain: Sequence[Hop],
    timings: Sequence[tuple[int, int, int]],
    *,
    round_trips_s: Sequence[float],
    carried: Sequence[bool],
    total_s: float,
) -> tuple[HopTrace, ...]:
    """Split the time of one trip around the ring.

    Args:
        timings: what each server says of queue, computing, and the delay to the next one, in microseconds.
        round_trips_s: between the client and each server.
        carried: for each server, whether its input came by way of the client.
    """
    if len(timings) != len(chain):
        return ()
    ways_s = []
    for index, is_carried in enumerate(carried):
        if index == 0:
            ways_s.append(round_trips_s[0] / 2)
        elif is_carried:
            ways_s.append((round_trips_s[index - 1] + round_trips_s[index]) / 2)
        else:
            ways_s.append(timings[index - 1][2] / 1e6)
    ways_s[-1] += round_trips_s[-1] / 2
    network_s = max(0.0, total_s - sum(queue + compute for queue, compute, _ in timings) / 1e6)
    known_s = sum(ways_s)
    shares = [way_s / known_s if known_s else 1 / len(ways_s) for way_s in ways_s]
    return tuple(
        HopTrace(
            peer_id=hop.peer_id,
            start=hop.start,
            end=hop.end,
            queue_s=queue / 1e6,
            compute_s=compute / 1e6,
            network_s=network_s * share,
            is_carried=is_carried,
        )
        for hop, (queue, compute, _), share, is_carried in zip(chain, timings, shares, carried, strict=True)
    )


def format_trace(steps: Sequence[StepTrace]) -> str:
    """Sum up steps as a small table: mean milliseconds per step and hop."""
    if not steps:
        return "no steps yet"
    count = len(steps)
    lines = [
        f"{count} steps, {sum(step.num_tokens for step in steps)} tokens, "
        f"{1000 * sum(step.total_s for step in steps) / count:.2f} ms a step"
    ]
    sums: dict[tuple[PeerId, int, int, bool], list[float]] = {}
    for step in steps:
        for hop in step.hops:
            totals = sums.setdefault((hop.peer_id, hop.start, hop.end, hop.is_carried), [0.0, 0.0, 0.0, 0.0])
            totals[0] += 1
            totals[1] += hop.network_s
            totals[2] += hop.queue_s
            totals[3] += hop.compute_s
    for (peer_id, start, end, is_carried), (visits, network, queue, compute) in sums.items():
        lines.append(
            f"  {peer_id.short}  blocks {start}:{end}  network {1000 * network / visits:.2f} ms  "
            f"queue {1000 * queue / visits:.2f} ms  compute {1000 * compute / visits:.2f} ms"
            + ("  (carried by this client)" if is_carried else "")
        )
    return "\n".join(lines)
