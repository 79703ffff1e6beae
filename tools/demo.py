"""A whole swarm on this machine: ``python3 tools/demo.py``.

Starts a bootstrap node and some servers as processes of their own, each with a part of the demo model, generates text
through them, shows where the time went, and compares the tokens with the same model run in one piece. Stops everything
that it started, also on Ctrl-C. Makes the environment first where it is missing. Exit code 0: the tokens were the same.
"""

from __future__ import annotations

import argparse
import sys

import environment

DEFAULT_PROMPT = "User: What is a class?\nAssistant:"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = environment.ROOT / "models" / "demo"
    parser.add_argument("--model", default=str(model), help="folder or name of a checkpoint (default: models/demo)")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="text to continue (default: %(default)r)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--servers", type=int, default=3, metavar="N", help="how many share the blocks (default: 3)")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1 or options.servers < 1:
        parser.error("--max-new-tokens and --servers must be at least 1")
    return options


def main() -> int:
    options = parse()
    environment.enter()
    from swarm_demo import run  # imports what is installed in the environment

    return run(options.model, options.prompt, max_new_tokens=options.max_new_tokens, num_servers=options.servers)


if __name__ == "__main__":
    sys.exit(main())
