"""Run every test of the project: ``python3 tools/test.py [PYTEST OPTIONS]``.

Makes the environment first where it is missing. Options go to pytest as they are, for example
``python3 tools/test.py packages/petals-core -k wire``. What runs everything runs it in two processes, one file of tests
after the other in each; ``-p no:xdist`` and pytest-xdist's own options change that.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import environment

# Nothing listens there: a test that asks the hub unawares fails at once, here and where there is a network.
NO_HUB = "http://127.0.0.1:9"
# Fixtures are shared within a file, so that a file is what a process takes.
IN_TWO_PROCESSES = ("-n", "2", "--dist", "loadfile")
# What only makes sense in one process, or says itself in how many.
OWN_WAY = ("-n", "--numprocesses", "--dist", "--tx", "-d", "-p", "--pdb", "--trace", "-s", "--capture", "--co")


def distribution(arguments: Sequence[str]) -> Sequence[str]:
    """Options that divide the tests among processes; none where the arguments choose files, or a way of their own."""
    chosen = (argument.startswith(OWN_WAY) or Path(argument.partition("::")[0]).exists() for argument in arguments)
    return () if any(chosen) else IN_TWO_PROCESSES


def main() -> None:
    environment.enter("--all-groups")
    # One thread each: the tests are many small computations, and idle OpenMP threads spin.
    variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_ENDPOINT": NO_HUB, **os.environ}
    os.chdir(environment.ROOT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts this in the background has it ignored
    sys.stdout.flush()
    options = [*distribution(sys.argv[1:]), *sys.argv[1:]]
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *options], variables)


if __name__ == "__main__":
    main()
