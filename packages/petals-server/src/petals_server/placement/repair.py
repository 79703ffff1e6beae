"""Making a swarm whole again in which no server is to spare."""

from __future__ import annotations

from collections.abc import Sequence

from petals_server.placement.coverage import Placed


def plan_repair(servers: Sequence[Placed], num_blocks: int) -> dict[bytes, int]:
    """Where each server (by peer id) should start so that as many blocks as possible are held and little is loaded.

    Servers keep their order along the model. Everybody who sees the same servers finds the same plan. If the plan
    lights all blocks and some places differ, then one of these servers can always go without leaving a block
    dark: of those that move right, the leftmost whose left neighbours are in place, and the other way round.
    O(servers x blocks^2).
    """
    ordered = sorted(servers, key=lambda server: (server.start, server.end, server.peer_id))
    # For each end of the blocks that are held so far: the best (blocks held, -blocks to load), and the way there.
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    steps: list[dict[int, tuple[int, int]]] = []
    for server in ordered:
        length = server.end - server.start
        after: dict[int, tuple[int, int]] = {}
        came: dict[int, tuple[int, int]] = {}
        for reach, (num_held, saved) in best.items():
            for start in range(num_blocks - length + 1):
                end = max(reach, start + length)
                value = (
                    num_held + end - max(reach, min(start, end)),
                    saved - min(length, abs(start - server.start)),
                )
                if end not in after or value > after[end]:
                    after[end], came[end] = value, (reach, start)
        best = after
        steps.append(came)
    reach = max(best, key=lambda end: (best[end], end))
    plan: dict[bytes, int] = {}
    for server, came in zip(reversed(ordered), reversed(steps), strict=True):
        reach, plan[server.peer_id] = came[reach]
    return plan
