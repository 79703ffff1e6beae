"""Run every test of the project: ``python3 tools/test.py [PYTEST OPTIONS]``.

Makes the environment first where it is missing. Options go to pytest as they are, for example
``python3 tools/test.py packages/petals-core -k wire``.
"""

from __future__ import annotations

import os
import signal
import sys

import environment

# Nothing listens there: a test that asks the hub unawares fails at once, here and where there is a network.
NO_HUB = "http://127.0.0.1:9"


def main() -> None:
    environment.enter("--all-groups")
    # One thread each: the tests are many small computations, and idle OpenMP threads spin.
    variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_ENDPOINT": NO_HUB, **os.environ}
    os.chdir(environment.ROOT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts this in the background has it ignored
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]], variables)


if __name__ == "__main__":
    main()
