"""A swarm in simulated time: servers that come, load, serve, move, lie, leave and crash."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from petals_server.placement.coverage import Coverage, Placed, Window
from petals_server.placement.intents import SETTLE_S, Intent, find_yielding, holds, may_leave, may_propose
from petals_server.placement.moves import Move, MoveCost
from petals_server.placement.observation import trust
from petals_server.placement.offers import Ability
from simulator.hardware import Machine, ModelSize, draw_machine, model_of
from simulator.policies import Earlier, Policy, Situation

HOUR_S: Final = 3600.0
_DISK_GB_PER_S: Final = 1.0
_START_S: Final = 15.0
"""Importing, measuring, announcing."""
_RESTART_S: Final = 5.0
"""Measuring and announcing after a move."""
_DRAIN_S: Final = (5.0, 30.0)
_LIFETIME_S: Final = (80.0, 120.0)
"""Between these an announcement goes on after its server has crashed: it is renewed every 40 s for 120 s."""
_LAG_S: Final = (0.1, 1.5)
"""Until an announcement is seen by everybody."""
_OBSERVED_AFTER_S: Final = 600.0
_NUM_OBSERVERS: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run."""

    num_servers: int = 1000
    num_blocks: int = 80
    churn_per_hour: float = 0.1
    hours: float = 24.0
    crash_share: float = 0.5
    """Of those that leave, how many without a word."""
    liar_share: float = 0.03
    """Of servers that announce ten times their speed."""
    lying_observers: float = 0.1
    mass_leave_share: float = 0.1
    """Of servers that crash at once after ``hours``; then an hour follows."""
    seed: int = 0


@dataclass(slots=True)
class Server:
    """One server as it is."""

    number: int
    peer_id: bytes
    machine: Machine
    exaggeration: float
    """What it says of its speed over what is true."""
    is_liar: bool
    ability: Ability
    """What it says of itself."""
    trust: float = 1.0
    """What others believe of what it says."""
    start: int = 0
    end: int = 0
    state: str = "joining"
    since_s: float = 0.0
    placed: Placed | None = None
    """As it counts in the view of all."""
    intent: Intent | None = None
    num_moves: int = 0
    listeners: dict[int, Callable[[], None]] = field(default_factory=dict)
    """Sessions, to be told when it is gone."""


@dataclass(slots=True)
class Totals:
    """What a run came to; integrals over time in seconds."""

    seconds: float = 0.0
    throughput: float = 0.0
    bound: float = 0.0
    ratio: float = 0.0
    dark_block_s: float = 0.0
    dark_s: float = 0.0
    server_s: float = 0.0
    num_moves: int = 0
    num_given_up: int = 0
    """Intents that did not hold."""


@dataclass(slots=True)
class Sample:
    """The swarm at one moment."""

    at_s: float
    throughput: float
    bound: float
    num_servers: int
    num_moving: int
    num_dark: int
    num_moves: int


class World:
    """Runs one policy on one course of arrivals and departures: equal seeds give equal servers and lives."""

    def __init__(self, settings: Settings, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.model: ModelSize = model_of(settings.num_blocks)
        self.now_s = 0.0
        self.view = Coverage(settings.num_blocks)
        """As everybody sees it, with believed speeds."""
        self.truth = Coverage(settings.num_blocks)
        """Servers that answer, with true speeds."""
        self.servers: dict[int, Server] = {}
        self.totals = Totals()
        self.samples: list[Sample] = []
        self.max_moving_share = 0.0
        self.online_changed: Callable[[Server], None] = lambda server: None
        self._lives = random.Random(f"lives {settings.seed}")
        self._rng = random.Random(f"rest {settings.seed} {policy.name}")
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._numbers = itertools.count()
        self._intents: dict[int, Intent] = {}
        self._moving: set[int] = set()
        self._ghosts = np.zeros(settings.num_blocks, dtype=np.int64)
        """Steady servers in the view that have crashed; who asks them gets no answer."""
        self._capacity = 0.0
        self._integrated_s = 0.0

    # --- time ---------------------------------------------------------------------------------------------------------

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._events, (time_s, next(self._sequence), action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something after a while."""
        self.at(self.now_s + delay_s, action)

    def run(self, until_s: float) -> None:
        """Let time pass."""
        events = self._events
        while events and events[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(events)
            action()
        self.now_s = until_s
        self._integrate()

    def _integrate(self) -> None:
        """Count the time since the last change of what is served; call it before each."""
        passed_s, self._integrated_s = self.now_s - self._integrated_s, self.now_s
        if passed_s <= 0:
            return
        totals, throughput, bound = self.totals, self.truth.throughput, self.bound
        num_dark = int(self.truth.is_dark.sum())
        totals.seconds += passed_s
        totals.throughput += passed_s * throughput
        totals.bound += passed_s * bound
        totals.ratio += passed_s * (throughput / bound if bound else 1.0)
        totals.dark_block_s += passed_s * num_dark
        totals.dark_s += passed_s * (num_dark > 0)
        totals.server_s += passed_s * len(self.servers)

    @property
    def bound(self) -> float:
        """What no placement and no routing of the servers present can exceed, those that load counted too."""
        return self._capacity / self.settings.num_blocks

    # --- lives --------------------------------------------------------------------------------------------------------

    def populate(self) -> None:
        """The first servers, already loaded, and everybody who comes later."""
        for _ in range(self.settings.num_servers):
            server = self._new_server()
            self._take(server, self.policy.join(self.view, server.ability))
            self._come_online(server)
            server.since_s = -self._rng.uniform(0, 2 * HOUR_S)
            if server.is_liar:
                self._observe(server)
        if self.settings.churn_per_hour > 0:
            self.after(self._until_arrival_s(), self._arrive)
        self._sample()

    def _until_arrival_s(self) -> float:
        return self._lives.expovariate(self.settings.churn_per_hour * self.settings.num_servers / HOUR_S)

    def _arrive(self) -> None:
        server = self._new_server()
        self._take(server, self.policy.join(self.view, server.ability))
        self.after(
            _START_S + (server.end - server.start) * self.model.block_gb / server.machine.load_gb_per_s,
            lambda: self._come_online(server),
        )
        self.after(self._until_arrival_s(), self._arrive)

    def _new_server(self) -> Server:
        rng, number = self._lives, next(self._numbers)
        machine = draw_machine(rng, self.model)
        is_liar = rng.random() < self.settings.liar_share
        exaggeration = rng.lognormvariate(0, 0.1) * (10 if is_liar else 1)
        server = Server(
            number=number,
            peer_id=hashlib.sha256(b"%d %d" % (self.settings.seed, number)).digest(),
            machine=machine,
            exaggeration=exaggeration,
            is_liar=is_liar,
            ability=_exaggerated(machine.ability, exaggeration),
        )
        self._integrate()
        self.servers[number] = server
        self._capacity += _capacity(machine)
        if self.settings.churn_per_hour > 0:
            life_s = rng.expovariate(self.settings.churn_per_hour / HOUR_S)
            crashes = rng.random() < self.settings.crash_share
            self.after(life_s, lambda: self._leave(server, crashes=crashes))
        return server

    def _take(self, server: Server, span: Window | Move) -> None:
        """It is on the way to a span: everybody knows, nobody relies on it."""
        server.start, server.end = span.start, span.end
        self._show(server, is_steady=False)

    def _show(self, server: Server, *, is_steady: bool) -> None:
        if server.placed is not None:
            self.view.remove(server.placed)
        server.placed = Placed(
            peer_id=server.peer_id,
            start=server.start,
            end=server.end,
            tokens_per_s=self._true(server).tokens_per_s * server.exaggeration * server.trust,
            is_steady=is_steady,
        )
        self.view.add(server.placed)

    def _come_online(self, server: Server) -> None:
        if server.state == "gone":
            return
        self._integrate()
        server.state, server.since_s, server.intent = "online", self.now_s, None
        self._moving.discard(server.number)
        self._intents.pop(server.number, None)
        self._show(server, is_steady=True)
        self.truth.add(self._true(server))
        self.after(self.policy.interval_s(len(self.servers), self._rng), lambda: self._check(server))
        if not self.policy.believes and server.trust == 1.0:
            self.after(_OBSERVED_AFTER_S, lambda: self._observe(server))
        self.online_changed(server)

    def _true(self, server: Server) -> Placed:
        offer = server.machine.ability.offer(server.end - server.start)
        return Placed(peer_id=server.peer_id, start=server.start, end=server.end, tokens_per_s=offer.tokens_per_s)

    def _go_offline(self, server: Server) -> None:
        self._integrate()
        if server.state == "online":
            self.truth.remove(self._true(server))

    def _leave(self, server: Server, *, crashes: bool) -> None:
        if server.state == "gone":
            return
        self._go_offline(server)
        del self.servers[server.number]
        self._capacity -= _capacity(server.machine)
        server.state = "gone"
        self._moving.discard(server.number)
        placed = server.placed
        assert placed is not None
        if crashes:
            if placed.is_steady:
                self._ghosts[placed.start : placed.end] += 1
            self.after(self._rng.uniform(*_LIFETIME_S), lambda: self._forget(server))
        else:
            self._intents.pop(server.number, None)
            self.view.remove(placed)
        for tell in list(server.listeners.values()):
            tell()

    def _forget(self, server: Server) -> None:
        """A dead server's announcement expires."""
        placed = server.placed
        assert placed is not None
        if placed.is_steady:
            self._ghosts[placed.start : placed.end] -= 1
        self._intents.pop(server.number, None)
        self.view.remove(placed)

    def _observe(self, server: Server) -> None:
        """Others have seen how fast it is."""
        if server.state == "gone" or self.policy.believes:
            return
        true_share = 1 / server.exaggeration
        votes = [
            (1.0 if server.is_liar else 0.1)
            if self._rng.random() < self.settings.lying_observers
            else true_share * self._rng.lognormvariate(0, 0.1)
            for _ in range(_NUM_OBSERVERS)
        ]
        server.trust = trust(votes)
        assert server.placed is not None
        self._show(server, is_steady=server.placed.is_steady)

    def leave_at_once(self, share: float) -> None:
        """A part of all servers crashes in one moment."""
        for server in self._rng.sample(list(self.servers.values()), int(share * len(self.servers))):
            self._leave(server, crashes=True)

    # --- moves --------------------------------------------------------------------------------------------------------

    def _check(self, server: Server) -> None:
        if server.state != "online":
            return
        self.after(self.policy.interval_s(len(self.servers), self._rng), lambda: self._check(server))
        if server.intent is not None:
            return
        assert server.placed is not None
        if isinstance(self.policy, Earlier):
            self.policy.at(self.now_s)
        move = self.policy.move(
            Situation(
                view=self.view,
                me=server.placed,
                ability=server.ability,
                cost=lambda: self._cost(server),
                stayed_s=self.now_s - server.since_s,
                num_moving=len(self._moving | self._intents.keys()),
                servers=lambda: self._others(server),
                rng=self._rng,
            )
        )
        if move is None:
            return
        if not self.policy.settles:
            self._move(server, move)
            return
        intent = Intent(
            peer_id=server.peer_id,
            start=move.start,
            end=move.end,
            issued_at_s=self.now_s,
            source=(server.start, server.end),
        )
        if not may_propose(intent.region, self._intents.values()):
            return
        server.intent = intent
        self.after(self._rng.uniform(*_LAG_S), lambda: self._announce_intent(server, intent))
        seen_before = {other.peer_id for other in self._intents.values()}
        self.after(SETTLE_S, lambda: self._settle(server, intent, move, seen_before))

    def _others(self, server: Server) -> list[Placed]:
        """The steady servers."""
        placed = (other.placed for other in self.servers.values() if other is not server)
        return [each for each in placed if each is not None and each.is_steady]

    def _cost(self, server: Server) -> MoveCost:
        block_gb = self.model.block_gb
        return MoveCost(
            fixed_s=sum(_DRAIN_S) / 2 + _RESTART_S + (server.end - server.start) * block_gb / _DISK_GB_PER_S,
            new_block_s=block_gb / server.machine.load_gb_per_s,
        )

    def _announce_intent(self, server: Server, intent: Intent) -> None:
        if server.intent is intent and server.state == "online":
            self._intents[server.number] = intent
            self._show(server, is_steady=False)

    def _settle(self, server: Server, intent: Intent, move: Move, seen_before: set[bytes]) -> None:
        if server.state != "online":
            return
        assert server.placed is not None
        others = self.view.without(server.placed)
        others.holders -= self._ghosts
        for peer_id in find_yielding(intent, self._intents.values(), seen_before=seen_before):
            number = next(number for number, each in self._intents.items() if each.peer_id == peer_id)
            rival = self.servers.get(number)
            if rival is not None:
                others.holders[rival.start : rival.end] += 1
        if holds(intent, self._intents.values()) and may_leave(
            server.placed, (move.start, move.end), others, min_witnesses=move.min_witnesses, reloads=not move.is_repair
        ):
            self._move(server, move)
            return
        self.totals.num_given_up += 1
        server.intent = None
        self._intents.pop(server.number, None)
        self._show(server, is_steady=True)

    def _move(self, server: Server, move: Move) -> None:
        self._go_offline(server)
        held = set(range(server.start, server.end))
        num_new = sum(block not in held for block in range(move.start, move.end))
        server.state = "moving"
        server.num_moves += 1
        self.totals.num_moves += 1
        self._moving.add(server.number)
        if server.intent is not None:
            self._intents[server.number] = replace(server.intent, has_left=True)
        self._take(server, move)
        self.max_moving_share = max(self.max_moving_share, len(self._moving) / len(self.servers))
        block_gb, machine = self.model.block_gb, server.machine
        took_s = (
            self._rng.uniform(*_DRAIN_S)
            + _RESTART_S
            + num_new * block_gb / machine.load_gb_per_s
            + (move.end - move.start) * block_gb / _DISK_GB_PER_S
        )
        self.after(took_s, lambda: self._come_online(server))
        for tell in list(server.listeners.values()):
            tell()

    # --- looking ------------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        self.samples.append(
            Sample(
                at_s=self.now_s,
                throughput=self.truth.throughput,
                bound=self.bound,
                num_servers=len(self.servers),
                num_moving=len(self._moving),
                num_dark=int(self.truth.is_dark.sum()),
                num_moves=self.totals.num_moves,
            )
        )
        self.after(60.0, self._sample)

    def online(self) -> Iterable[Server]:
        """Servers that answer."""
        return (server for server in self.servers.values() if server.state == "online")


def _exaggerated(ability: Ability, factor: float) -> Ability:
    assert ability.link_tokens_per_s is not None
    return replace(
        ability,
        block_tokens_per_s=ability.block_tokens_per_s * factor,
        link_tokens_per_s=ability.link_tokens_per_s * factor,
    )


def _capacity(machine: Machine) -> float:
    """The most that it gives: blocks times tokens per second."""
    return max(offer.tokens_per_s * offer.num_blocks for offer in machine.ability.offers)
