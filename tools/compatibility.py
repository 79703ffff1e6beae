"""Try both ends of the supported versions of torch and Transformers: ``python3 tools/compatibility.py [END ...]``.

Each end gets an environment of its own under ``.compatibility`` (git-ignored; several gigabytes where the package index
has torch with CUDA only), with the newest versions of everything else that these two allow. The tests that compare
results with local models run in it. Prints a table for ``docs/compatibility.md``.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import environment

ENVIRONMENTS = environment.ROOT / ".compatibility"
ENDS = {
    "oldest": {"torch": "2.11.0", "transformers": "5.17.0"},
    "newest": {"torch": "2.15.0", "transformers": "5.23.0"},
}
MEMBERS = ("petals-core", "petals-dht", "petals-server", "petals-client")
TESTS = ("packages/petals-core/tests", "packages/petals-server/tests", "packages/petals-client/tests", "tests")
PROBE = """
import platform, torch, transformers
print(platform.python_version(), torch.__version__, transformers.__version__)
"""
_SUMMARY = re.compile(r"^(?:=+ )?(\d+ (?:passed|failed|error).*) in ", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the tests went with one pair of versions."""

    versions: dict[str, str]
    python: str
    passed: bool
    summary: str
    duration_s: float


def make_environment(end: str) -> Path:
    """Install one end of the range and return its Python."""
    folder = ENVIRONMENTS / end
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        environment.uv("venv", "--no-config", "--python", sys.executable, str(folder))
    # Without the project's settings, because those pin every version to the ones in between.
    wanted = [f"{name}=={version}" for name, version in ENDS[end].items()]
    members = [option for name in MEMBERS for option in ("--editable", f"packages/{name}")]
    tests = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "matplotlib", "peft"]
    environment.uv("pip", "install", "--no-config", "--python", str(python), *wanted, *members, *tests)
    return python


def run_tests(end: str, python: Path, options: list[str]) -> Outcome:
    """Run the tests of the packages that touch torch or Transformers, and those that cross packages."""
    variables = {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9", **os.environ}
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *TESTS, *options]
    started_s = time.monotonic()
    process = subprocess.Popen(
        command, cwd=environment.ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = process.wait()
    summary = _SUMMARY.findall("".join(lines))
    versions = subprocess.check_output([str(python), "-c", PROBE], text=True).split()
    return Outcome(
        versions=dict(zip(("torch", "transformers"), versions[1:], strict=True)),
        python=versions[0],
        passed=code == 0,
        summary=summary[-1] if summary else f"pytest ended with exit code {code}",
        duration_s=time.monotonic() - started_s,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="*", help=f"which ends to try: {' or '.join(ENDS)} (default: both)")
    parser.add_argument("--pytest", default="", help="further options for pytest, in one string")
    arguments = parser.parse_args()
    ends = arguments.ends or list(ENDS)
    if unknown := set(ends) - set(ENDS):
        parser.error(f"no such end: {', '.join(sorted(unknown))}")
    environment.enter("--all-groups")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see tools/test.py
    outcomes = [run_tests(end, make_environment(end), arguments.pytest.split()) for end in ends]
    print("\n| date | Python | torch | Transformers | tests |\n|---|---|---|---|---|")
    for outcome in outcomes:
        torch, transformers = outcome.versions["torch"], outcome.versions["transformers"]
        print(f"| {date.today()} | {outcome.python} | {torch} | {transformers} | {outcome.summary} |")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
