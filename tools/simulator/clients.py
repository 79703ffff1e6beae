"""Clients of a simulated swarm: each keeps a session, over a chain that the product's own planner chooses."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Final

from petals_core.addresses import Address
from petals_core.announcement import Announcement
from petals_core.errors import MissingBlocksError
from petals_core.identity import PeerId
from petals_core.routing.cost import estimate_cost
from petals_core.routing.graph import Chain, Server
from petals_core.routing.planner import plan_chain
from simulator.hardware import draw_place
from simulator.world import Server as SimulatedServer
from simulator.world import World

_LIFE_S: Final = 7200.0
_RETRY_S: Final = 5.0
_MAX_LOAD: Final = 10.0
_ADDRESS: Final = (Address("192.0.2.1", 31330),)


def plan(world: World, servers: list[tuple[Announcement, PeerId, float]], rng: random.Random) -> Chain:
    """The one call of the product's planner: announcements with the round trip that this client measured.

    Raises:
        MissingBlocksError: a block is dark.
    """
    costs: list[Server] = [
        estimate_cost(announcement, peer_id, round_trip_s=round_trip_s, penalty_s=0.0, noise=rng.random())
        for announcement, peer_id, round_trip_s in servers
    ]
    return plan_chain(costs, 0, world.settings.num_blocks, model_name="simulated")


@dataclass(slots=True, eq=False)
class _Session:
    number: int
    place: tuple[float, float]
    access_s: float
    ends_at_s: float
    hops: list[tuple[SimulatedServer, int]] = field(default_factory=list)
    """Servers and how many blocks each computes."""
    since_s: float = 0.0
    tokens_per_s: float = 0.0


class Clients:
    """So many sessions at a time."""

    def __init__(self, world: World, num_sessions: int) -> None:
        self.world = world
        self.num_sessions = num_sessions
        self.route_s: list[tuple[float, float]] = []
        """(when, seconds of one token along a route), of each plan."""
        self.num_plans = 0
        self.num_replans = 0
        """Sessions that went on elsewhere since a server left or moved."""
        self.stalled_s = 0.0
        """Time in which sessions found no chain."""
        self.hops = 0
        self.served: dict[int, float] = {}
        """Tokens times blocks that each server computed."""
        self._rng = random.Random(f"clients {world.settings.seed}")
        self._numbers = itertools.count()
        self._announcements: dict[int, tuple[tuple[int, int, int, float], Announcement, PeerId]] = {}
        self._demand: dict[int, float] = {}
        """Tokens times blocks per second that sessions want of each server now."""
        for _ in range(num_sessions):
            world.after(self._rng.uniform(0, 600), self._open)

    def _open(self) -> None:
        rng, world = self._rng, self.world
        place, access_s = draw_place(rng)
        life_s = rng.expovariate(1 / _LIFE_S)
        session = _Session(next(self._numbers), place, access_s, world.now_s + life_s)
        self._route(session)
        world.after(life_s, lambda: self._close(session))
        world.after(life_s, self._open)

    def _close(self, session: _Session) -> None:
        self._leave(session)
        session.ends_at_s = -math.inf

    def _leave(self, session: _Session) -> None:
        lasted_s = self.world.now_s - session.since_s
        for server, num_blocks in session.hops:
            wanted = num_blocks * session.tokens_per_s
            self.served[server.number] = self.served.get(server.number, 0.0) + wanted * lasted_s
            self._demand[server.number] -= wanted
            server.listeners.pop(session.number, None)
        session.hops = []

    def _interrupted(self, session: _Session) -> None:
        self._leave(session)
        self.num_replans += 1
        # Several servers may go at once: the new chain is planned when all have been told.
        self.world.after(0.0, lambda: self._route(session))

    def _route(self, session: _Session) -> None:
        world = self.world
        if session.ends_at_s <= world.now_s or session.hops:
            return
        by_peer: dict[PeerId, SimulatedServer] = {}
        candidates: list[tuple[Announcement, PeerId, float]] = []
        for server in world.online():
            announcement, peer_id = self._announcement(server)
            by_peer[peer_id] = server
            round_trip_s = server.machine.round_trip_s(session.place, session.access_s)
            candidates.append((announcement, peer_id, round_trip_s))
        self.num_plans += 1
        try:
            chain = plan(world, candidates, self._rng)
        except MissingBlocksError:
            self.stalled_s += _RETRY_S
            world.after(_RETRY_S, lambda: self._route(session))
            return
        session.since_s = world.now_s
        session.hops = [(by_peer[hop.peer_id], hop.end - hop.start) for hop in chain]
        token_s = self._token_s(session)
        session.tokens_per_s = 1 / token_s
        for server, num_blocks in session.hops:
            wanted = num_blocks * session.tokens_per_s
            self._demand[server.number] = self._demand.get(server.number, 0.0) + wanted
            server.listeners[session.number] = lambda: self._interrupted(session)
        self.hops += len(chain)
        self.route_s.append((world.now_s, token_s))

    def _token_s(self, session: _Session) -> float:
        """One token along the chain and back, from server to server."""
        place, access_s, total_s = session.place, session.access_s, 0.0
        for server, num_blocks in session.hops:
            machine = server.machine
            total_s += machine.round_trip_s(place, access_s) / 2 + num_blocks * machine.block_s
            place, access_s = machine.place, machine.access_s
        return total_s + math.dist(place, session.place) + access_s + session.access_s

    def _announcement(self, server: SimulatedServer) -> tuple[Announcement, PeerId]:
        """As the server would announce itself, its load in steps of a half."""
        offer = server.machine.ability.offer(server.end - server.start)
        used = self._demand.get(server.number, 0.0) / (offer.tokens_per_s * offer.num_blocks)
        load = min(_MAX_LOAD, round(2 * used / max(1e-3, 1 - used)) / 2 if used < 1 else _MAX_LOAD)
        key = (server.start, server.end, server.num_moves, load)
        known = self._announcements.get(server.number)
        if known is not None and known[0] == key:
            return known[1], known[2]
        announcement = Announcement(
            model_name="simulated",
            fingerprint="simulated",
            num_blocks=self.world.settings.num_blocks,
            start=server.start,
            end=server.end,
            addresses=_ADDRESS,
            state="online",
            torch_dtype="bfloat16",
            issued_at_s=0.0,
            expires_at_s=120.0,
            inference_tokens_per_s=offer.tokens_per_s * server.exaggeration,
            load=load,
        )
        peer_id = PeerId(server.peer_id) if known is None else known[2]
        self._announcements[server.number] = (key, announcement, peer_id)
        return announcement, peer_id
