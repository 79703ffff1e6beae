"""The rules that are compared: the product's, and that of earlier Petals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from petals_server.placement.coverage import Coverage, Placed, Window
from petals_server.placement.moves import Move, MoveCost, MoveRules, check_interval_s, consider_move, is_settled
from petals_server.placement.offers import Ability


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a server knows when it considers moving."""

    view: Coverage
    """Of the whole swarm, itself included."""
    me: Placed
    ability: Ability
    cost: Callable[[], MoveCost]
    stayed_s: float
    num_moving: int
    servers: Callable[[], Sequence[Placed]]
    """All that are steady; takes long, so it is asked only where it is needed."""
    rng: random.Random


class Policy(Protocol):
    """How servers choose their blocks."""

    name: str
    settles: bool
    """Whether moves are agreed through the directory first."""
    believes: bool
    """Whether announced speeds are taken for true."""

    def join(self, view: Coverage, ability: Ability) -> Window: ...

    def interval_s(self, num_servers: int, rng: random.Random) -> float: ...

    def move(self, now: Situation) -> Move | None: ...


class Product:
    """``petals_server.placement``."""

    name = "petals"
    settles = True
    believes = False

    def __init__(self, rules: MoveRules, base_interval_s: float = 15.0) -> None:
        self.rules = rules
        self._base_interval_s = base_interval_s

    def join(self, view: Coverage, ability: Ability) -> Window:
        return view.choose_window(ability.offers)

    def interval_s(self, num_servers: int, rng: random.Random) -> float:
        return check_interval_s(num_servers, base_s=self._base_interval_s) * rng.uniform(0.5, 1.5)

    def move(self, now: Situation) -> Move | None:
        if is_settled(now.view, self.rules):
            return None
        return consider_move(
            now.view.without(now.me),
            now.me,
            now.ability.some_offers(now.me.end - now.me.start, (now.rng.random(), now.rng.random())),
            cost=now.cost(),
            stayed_s=now.stayed_s,
            num_moving=now.num_moving,
            rules=self.rules,
            servers=now.servers() if now.view.is_dark.any() else (),
        )


_THRESHOLD: Final = 1.2
_MEAN_INTERVAL_S: Final = 120.0
_MAX_ROUNDS: Final = 3
_REMEMBERED_S: Final = 60.0


class Earlier:
    """The rule of earlier Petals, as its papers have it (Borzunov et al. 2022, arXiv 2209.01188, section 3.2; and 2023,
    arXiv 2312.08361, appendix on load balancing).

    A newcomer takes the window whose blocks' total throughputs, sorted, come first in lexicographic order. From time to
    time each server works out how the swarm would be if all servers chose anew in turn, itself first; if the swarm's
    throughput (of its weakest block) were 20 % higher, it moves. Nothing is agreed, and announced speeds are believed.
    """

    name = "earlier rule"
    settles = False
    believes = True

    def __init__(self) -> None:
        self._now_s = 0.0
        self._ideal: tuple[float, float] | None = None

    def join(self, view: Coverage, ability: Ability) -> Window:
        start = _worst_window(view.speeds, ability.max_blocks)
        offer = ability.offer(ability.max_blocks)
        return Window(start=start, end=start + offer.num_blocks, tokens_per_s=offer.tokens_per_s)

    def interval_s(self, num_servers: int, rng: random.Random) -> float:
        return rng.expovariate(1 / _MEAN_INTERVAL_S)

    def at(self, now_s: float) -> None:
        """Tell the time: what an equilibrium would be is worked out once a minute for all."""
        self._now_s = now_s

    def move(self, now: Situation) -> Move | None:
        view, me = now.view, now.me
        present = float(view.speeds.min())
        if view.bound < _THRESHOLD * present:  # no placement is so much better
            return None
        others = view.speeds.copy()
        others[me.start : me.end] -= me.tokens_per_s
        if others.min() <= 1e-9 * view.bound and present > 0:
            return None  # leaving would break the chain
        length = me.end - me.start
        start = _worst_window(others, length)
        if start == me.start:
            return None
        if self._ideal is None or self._now_s - self._ideal[0] > _REMEMBERED_S:
            self._ideal = (self._now_s, _equilibrium(view.speeds, now.servers()))
        if self._ideal[1] < _THRESHOLD * present:
            return None
        return Move(start=start, end=start + length, is_repair=False, gain=0.0, min_witnesses=0)


def _worst_window(speeds: NDArray[np.float64], length: int) -> int:
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(speeds, length), axis=1)
    best = np.arange(len(windows))
    for column in range(length):
        values = windows[best, column]
        best = best[values <= values.min() + 1e-9 * abs(values.min())]
        if len(best) == 1:
            break
    return int(best[0])


def _equilibrium(speeds: NDArray[np.float64], servers: Sequence[Placed]) -> float:
    """The weakest block's throughput after all have chosen anew, round after round."""
    speeds = speeds.copy()
    starts = [server.start for server in servers]
    for _ in range(_MAX_ROUNDS):
        moved = False
        for number, server in enumerate(servers):
            length = server.end - server.start
            start = starts[number]
            speeds[start : start + length] -= server.tokens_per_s
            starts[number] = _worst_window(speeds, length)
            speeds[starts[number] : starts[number] + length] += server.tokens_per_s
            moved |= starts[number] != start
        if not moved:
            break
    return float(speeds.min())
