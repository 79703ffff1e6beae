"""Whether a server should move, and where to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from petals_server.placement.coverage import Coverage, Offer, Placed
from petals_server.placement.repair import plan_repair

MAX_REPAIRED_SERVERS: Final = 64
"""Above it a swarm with a dark block and no server to spare is left to newcomers: the plan takes too long to find."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRules:
    """When moving is worth it."""

    good_balance: float = 0.99
    """From this part of the bound on nobody moves."""
    min_gain: float = 0.03
    """What a move must gain, as a part of what the mover gives in a balanced swarm: the hysteresis."""
    horizon_s: float = 900.0
    """For so long a gain is expected to last; what is lost while a server reloads is weighed against it."""
    min_stay_s: float = 1200.0
    """Time between two moves of one server, unless a block is dark."""
    urgent_balance: float = 0.95
    """Below it servers stay only ``min_urgent_stay_s``."""
    min_urgent_stay_s: float = 300.0
    max_moving_share: float = 0.04
    """Of all servers, how many may be on the move; one may always be."""
    min_repairing: int = 3
    """So many may always be on the move where a block is dark."""
    min_witnesses: int = 2
    """Other steady servers on each block that a move leaves, to make the swarm faster; one where a block is dark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A server's best move."""

    start: int
    end: int
    is_repair: bool
    """It lights a dark block, or makes room for another server that does."""
    gain: float
    """In tokens per second of the whole swarm; 0 for repairs."""
    min_witnesses: int
    """Other steady servers that each block needs that the mover leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCost:
    """For how long a move takes a server away."""

    fixed_s: float
    """Draining, loading again what it holds already, measuring."""
    new_block_s: float
    """For each block that it did not hold before."""


def is_settled(everybody: Coverage, rules: MoveRules) -> bool:
    """Whether nobody needs to move: all blocks are held, evenly enough."""
    return everybody.balance >= rules.good_balance and not everybody.is_dark.any()


def consider_move(
    others: Coverage,
    me: Placed,
    offers: Sequence[Offer],
    *,
    cost: MoveCost,
    stayed_s: float,
    num_moving: int,
    rules: MoveRules,
    servers: Sequence[Placed] = (),
) -> Move | None:
    """The move that ``me`` should make now, or None.

    Args:
        others: all other servers; those that move count where they go.
        offers: what it could hold instead.
        cost: for how long a move takes the server away.
        stayed_s: since it holds its span.
        num_moving: servers that have an intent now.
        servers: the steady servers without ``me``, for repairs of swarms in which none is to spare.
    """
    max_moving = int(rules.max_moving_share * (others.num_servers + 1))
    held = slice(me.start, me.end)
    is_dark = others.is_dark
    is_dark[held] = False
    if is_dark.any():
        return _repair(others, me, offers, servers) if num_moving < max(rules.min_repairing, max_moving) else None
    if num_moving >= max(1, max_moving):
        return None
    swarm = others.copy()
    swarm.add(me)
    share = swarm.bound
    min_stay_s = rules.min_stay_s if swarm.balance >= rules.urgent_balance else rules.min_urgent_stay_s
    if swarm.balance >= rules.good_balance or stayed_s < min_stay_s or others.holders[held].min() < rules.min_witnesses:
        return None
    before, meanwhile = swarm.soft_throughput(share), others.soft_throughput(share)
    loss = max(0.0, before - meanwhile) / rules.horizon_s
    window = others.choose_window(offers, loaded=(me.start, me.end), price=loss * cost.new_block_s)
    if (window.start, window.end) == (me.start, me.end):
        return None
    num_new = sum(not me.start <= block < me.end for block in range(window.start, window.end))
    swarm.speeds[held] -= me.tokens_per_s
    swarm.speeds[window.start : window.end] += window.tokens_per_s
    gain = swarm.soft_throughput(share) - before
    if gain < rules.min_gain * me.tokens_per_s * (me.end - me.start) / others.num_blocks:
        return None
    if gain <= loss * (cost.fixed_s + cost.new_block_s * num_new):
        return None
    return Move(start=window.start, end=window.end, is_repair=False, gain=gain, min_witnesses=rules.min_witnesses)


def _repair(others: Coverage, me: Placed, offers: Sequence[Offer], servers: Sequence[Placed]) -> Move | None:
    """How ``me`` helps to light dark blocks.

    Servers whose blocks all others hold go where it is dark. Where there are none, neighbours shift like beads on a
    string until the overlap has become the gap (``plan_repair``), each only as far as others hold what it leaves.
    """
    if others.holders[me.start : me.end].min() >= 1:
        window = others.choose_window(offers)
        if not others.is_dark[window.start : window.end].any():
            return None
        return Move(start=window.start, end=window.end, is_repair=True, gain=0.0, min_witnesses=1)
    everybody = [*servers, me]
    if len(everybody) > MAX_REPAIRED_SERVERS:
        return None
    counted = others.holders.copy()
    counted[me.start : me.end] += 1
    if any(counted[server.start : server.end].min() >= 2 for server in servers):
        return None  # That one goes.
    start = plan_repair(everybody, others.num_blocks)[me.peer_id]
    end = start + me.end - me.start
    left = [block for block in range(me.start, me.end) if not start <= block < end]
    if start == me.start or any(others.holders[block] < 1 for block in left):
        return None
    return Move(start=start, end=end, is_repair=True, gain=0.0, min_witnesses=1)


def check_interval_s(num_servers: int, *, base_s: float) -> float:
    """How often a server considers moving, on average; ``base_s`` in a swarm of 50 to 250 servers.

    Looking costs an announcement for each server of the model, and asking some of them. Above 250 servers each looks
    more seldom in proportion, so that its traffic stays bounded and the swarm as a whole looks as often. Below 50 each
    looks more often, five times at most: there a server that is lost is missed most, and few have to be asked.
    """
    return base_s * min(1.0, max(0.2, num_servers / 50)) * max(1.0, num_servers / 250)
