"""Generations that must not change while servers are killed: ``python3 tools/soak.py --seed 0``.

Six servers, real processes, hold every block of a small model twice. Every 2 seconds a random one is killed (SIGKILL),
and started again 3 seconds later under its old identity and port, while one client generates 200 times 32 tokens from
random prompts, in float32. Then the local model generates the same. Prints what was killed, how often sessions were
mended, and how long tokens took. Exit code 0: all generations were done, and are those of the local model.

The servers are forked from a process that has imported everything (``tools/nursery.py``), so that on a small machine a
start costs a fraction of a second of computing instead of seconds, and the schedule is kept; they are servers like any
other in all else.
"""

from __future__ import annotations

import argparse
import sys

import environment


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of who is killed (default: 0)")
    parser.add_argument("--generations", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="of each generation (default: %(default)s)")
    parser.add_argument("--kill-every", type=float, default=2.0, metavar="S", help="seconds (default: %(default)s)")
    parser.add_argument("--restart-after", type=float, default=3.0, metavar="S", help="seconds (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.generations < 1 or options.tokens < 1 or options.kill_every <= 0 or options.restart_after < 0:
        parser.error("counts must be at least 1 and times positive")
    return options


def main() -> int:
    options = parse()
    environment.enter()
    from local_swarm import stopping_in_order
    from soak_run import Settings, format_outcome, run  # imports what is installed in the environment

    settings = Settings(
        seed=options.seed,
        num_generations=options.generations,
        num_tokens=options.tokens,
        kill_every_s=options.kill_every,
        restart_after_s=options.restart_after,
    )
    with stopping_in_order():
        outcome = run(settings, tell=lambda text: print(text, flush=True))
    print(format_outcome(outcome))
    return 0 if outcome.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
