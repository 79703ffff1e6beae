"""Every architecture against its local model, as a table: ``python3 tools/architectures.py [FAMILY ...]``.

For each family a tiny random checkpoint of six blocks is made, split over three servers of this process, and compared
with the same checkpoint loaded by Transformers: logits of a padded batch, a session in pieces of which some are taken
back, and a greedy continuation of a padded batch. Makes the environment first where it is missing. Exit code 0: all
are exact.
"""

from __future__ import annotations

import argparse
import sys

import environment


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="which to compare (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print the table as it stands in docs/models.md")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    environment.enter()
    from conformance_table import run  # imports what is installed in the environment

    return run(options.families, as_markdown=options.markdown)


if __name__ == "__main__":
    sys.exit(main())
