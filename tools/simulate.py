"""A swarm in simulated time, by the product's rules of placement and routing, beside the rule of earlier Petals.

    python tools/simulate.py                                                  # 1,000 servers, 80 blocks, 24 h
    python tools/simulate.py --servers 10000 --blocks 126 --sessions 20

Servers have published speeds of real cards (``simulator/hardware.py``), homes' uplinks, and lives; some lie about their
speed and some observers lie about others. After the hours a tenth of the servers crashes at once, and another hour
follows. Prints figures and writes a picture. Equal arguments give equal figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import environment

environment.enter()

from petals_server.placement.moves import MoveRules
from simulator import report
from simulator.policies import Earlier, Policy, Product
from simulator.world import Settings, World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--churn", type=float, default=0.1, help="share of the servers that leave and come in an hour")
    parser.add_argument(
        "--liars", type=float, default=0.03, help="share of servers that announce ten times their speed"
    )
    parser.add_argument("--sessions", type=int, default=100, help="sessions of clients at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rules", default="petals,earlier", help="which rules to run")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    settings = Settings(
        num_servers=options.servers,
        num_blocks=options.blocks,
        hours=options.hours,
        churn_per_hour=options.churn,
        liar_share=options.liars,
        seed=options.seed,
    )
    title = (
        f"{options.servers} servers, {options.blocks} blocks, {options.churn:.0%} churn an hour, {options.hours:g} h, "
        f"{options.liars:.0%} liars, seed {options.seed}"
    )
    print(title, flush=True)
    policies: dict[str, Policy] = {"petals": Product(MoveRules()), "earlier": Earlier()}
    outcomes = []
    for name in options.rules.split(","):
        outcome = report.run(World(settings, policies[name]), options.sessions)
        outcomes.append(outcome)
        print("\n".join(outcome.lines()), flush=True)
    if options.picture is not None:
        report.draw(outcomes, options.picture, title)
        print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
