"""What a run says: figures and a picture."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulator.clients import Clients
from simulator.world import HOUR_S, Sample, World


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One policy's run."""

    name: str
    samples: list[Sample]
    mean_share: float
    """Throughput over bound, mean over time."""
    lowest_share: float
    """Of a hundredth of the time."""
    dark_block_s: float
    dark_s: float
    moves_per_4h: float
    """Per server."""
    num_given_up: int
    max_moving_share: float
    recovered_s: float | None
    """After the mass departure, until 0.95 of the bound again; None: not within the hour."""
    lowest_after: float
    dark_block_s_after: float
    max_moving_share_after: float
    route_s: list[tuple[float, float]]
    mean_hops: float
    num_plans: int
    num_replans: int
    stalled_s: float
    use: NDArray[np.float64]
    """For each server that is an hour old or older: what it computed since over what it could have."""
    busiest_share: float
    """What the tenth of these servers that computed most did of what all did."""
    wall_s: float

    def lines(self) -> list[str]:
        """For people."""
        recovered = "not within an hour" if self.recovered_s is None else f"after {self.recovered_s:.0f} s"
        lines = [
            f"{self.name}:",
            f"  throughput {self.mean_share:.4f} of the max-flow bound on average; "
            f"{self.lowest_share:.3f} in the worst hundredth of the time",
            f"  moves: {self.moves_per_4h:.2f} per server and 4 h; at most {self.max_moving_share:.2%} of the servers "
            f"at once; {self.num_given_up} intents gave way",
            f"  dark: {self.dark_block_s:.0f} block-seconds in {self.dark_s:.0f} s",
            f"  mass departure: lowest {self.lowest_after:.3f}; 0.95 of the bound again {recovered}; at most "
            f"{self.max_moving_share_after:.2%} moving; {self.dark_block_s_after:.0f} dark block-seconds",
        ]
        if self.route_s:
            times = np.array([seconds for _, seconds in self.route_s]) * 1000
            low, middle, high = np.percentile(times, (10, 50, 90))
            lines.append(
                f"  routes: {self.num_plans} plans, {self.mean_hops:.1f} servers; a token takes {middle:.0f} ms "
                f"(10 %: {low:.0f}, 90 %: {high:.0f}); {self.num_replans} sessions went on elsewhere, "
                f"{self.stalled_s:.0f} s without a chain"
            )
            lines.append(
                f"  load: of all that was computed the busiest tenth of the servers did {self.busiest_share:.0%}; the "
                f"busiest one did {self.use.max():.0%} of what it can"
            )
        lines.append(f"  took {self.wall_s:.0f} s")
        return lines


def measure_mass_departure(world: World, share: float) -> tuple[float | None, float]:
    """Let a part of the servers crash and look for an hour: when 0.95 of the bound is back for good, and the lowest."""
    left_s = world.now_s
    world.leave_at_once(share)
    recovered_s: float | None = None
    lowest = 1.0
    for seconds in range(0, int(HOUR_S), 10):
        world.run(left_s + seconds)
        ratio = world.truth.throughput / world.bound
        lowest = min(lowest, ratio)
        if ratio >= 0.95:
            recovered_s = float(seconds) if recovered_s is None else recovered_s
        elif seconds <= 600:
            recovered_s = None
    return recovered_s, lowest


def run(world: World, num_sessions: int) -> Outcome:
    """Run a world for its hours, then the mass departure."""
    started_s = time.perf_counter()
    settings = world.settings
    world.populate()
    clients = Clients(world, num_sessions)
    world.run(settings.hours * HOUR_S)
    totals = world.totals
    shares = sorted(sample.throughput / sample.bound for sample in world.samples if sample.bound)
    lived = {number: server.since_s for number, server in world.servers.items()}
    use = np.array(
        [
            clients.served.get(number, 0.0)
            / (world.servers[number].machine.ability.block_tokens_per_s * (world.now_s - since_s))
            for number, since_s in lived.items()
            if world.now_s - since_s >= HOUR_S
        ]
        or [0.0]
    )
    computed = np.sort([clients.served.get(number, 0.0) for number in world.servers])[::-1]
    busiest_share = float(computed[: max(1, len(computed) // 10)].sum() / max(1e-9, computed.sum()))
    mean_share, dark_block_s, dark_s = totals.ratio / totals.seconds, totals.dark_block_s, totals.dark_s
    moves_per_4h = totals.num_moves / (totals.server_s / (4 * HOUR_S))
    max_moving_share, world.max_moving_share = world.max_moving_share, 0.0
    recovered_s, lowest_after = measure_mass_departure(world, settings.mass_leave_share)
    return Outcome(
        name=world.policy.name,
        samples=world.samples,
        mean_share=mean_share,
        lowest_share=shares[len(shares) // 100],
        dark_block_s=dark_block_s,
        dark_s=dark_s,
        moves_per_4h=moves_per_4h,
        num_given_up=totals.num_given_up,
        max_moving_share=max_moving_share,
        recovered_s=recovered_s,
        lowest_after=lowest_after,
        dark_block_s_after=totals.dark_block_s - dark_block_s,
        max_moving_share_after=world.max_moving_share,
        route_s=clients.route_s,
        mean_hops=clients.hops / max(1, len(clients.route_s)),
        num_plans=clients.num_plans,
        num_replans=clients.num_replans,
        stalled_s=clients.stalled_s,
        use=use,
        busiest_share=busiest_share,
        wall_s=time.perf_counter() - started_s,
    )


def draw(outcomes: list[Outcome], path: Path, title: str) -> None:
    """Write a picture of all runs beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 2, figsize=(13, 11), constrained_layout=True)
    figure.suptitle(title)
    share, tokens, moving, moves, routes, load = axes.flat
    for outcome in outcomes:
        hours = np.array([sample.at_s for sample in outcome.samples]) / HOUR_S
        throughput = np.array([sample.throughput for sample in outcome.samples])
        bound = np.array([sample.bound for sample in outcome.samples])
        label = outcome.name
        share.plot(hours, throughput / bound, label=label, linewidth=0.9)
        tokens.plot(hours, throughput, label=label, linewidth=0.9)
        if outcome is outcomes[0]:
            tokens.plot(hours, bound, label="max-flow bound", color="black", linewidth=0.7)
        servers = np.array([sample.num_servers for sample in outcome.samples])
        moving.plot(
            hours,
            100 * np.array([sample.num_moving for sample in outcome.samples]) / servers,
            label=label,
            linewidth=0.9,
        )
        moves.plot(hours, [sample.num_moves for sample in outcome.samples], label=label)
        if outcome.route_s:
            routes.hist(
                [1000 * seconds for _, seconds in outcome.route_s], bins=60, histtype="step", density=True, label=label
            )
            load.hist(100 * np.clip(outcome.use, 0, 1), bins=40, histtype="step", density=True, label=label)
    share.axhline(0.95, color="grey", linestyle=":")
    for axis, name, across in (
        (share, "throughput over the max-flow bound", "hours"),
        (tokens, "tokens per second", "hours"),
        (moving, "servers on the move, %", "hours"),
        (moves, "moves since the start", "hours"),
        (routes, "routes by the time of a token", "ms"),
        (load, "servers by their load", "% of what they can compute"),
    ):
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(across)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
