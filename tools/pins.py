"""Write the version of every package in ``uv.lock`` into the root ``pyproject.toml``, as constraints.

The lock file records download addresses, so it stays out of the repository; the constraints do its work. To move to
newer versions, edit the ``torch`` and ``transformers`` lines by hand, then run ``python tools/pins.py --upgrade``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PINNED_BY_HAND = ("torch", "transformers")
BLOCK = re.compile(r"^constraint-dependencies = \[.*?^\]\n", re.MULTILINE | re.DOTALL)


def locked_versions(lock_text: str) -> dict[str, set[str]]:
    """Return the public versions (without local parts such as ``+cpu``) of each registry package of a lock file."""
    versions: dict[str, set[str]] = {}
    for package in tomllib.loads(lock_text)["package"]:
        if "registry" in package["source"]:
            versions.setdefault(package["name"], set()).add(package["version"].partition("+")[0])
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="forget all pins but torch and transformers first")
    arguments = parser.parse_args()
    pyproject = ROOT / "pyproject.toml"
    text = pyproject.read_text()
    if arguments.upgrade:
        block = BLOCK.search(text)
        if block is None:
            sys.exit(f"error: {pyproject} has no constraint-dependencies")
        kept = [
            line
            for line in block[0].splitlines()
            if line.strip().startswith(tuple(f'"{name}==' for name in PINNED_BY_HAND))
        ]
        text = BLOCK.sub("constraint-dependencies = [\n" + "\n".join(kept) + "\n]\n", text)
        pyproject.write_text(text)
    subprocess.run(["uv", "lock", *(["--upgrade"] if arguments.upgrade else [])], cwd=ROOT, check=True)
    versions = locked_versions((ROOT / "uv.lock").read_text())
    # Where Python versions divide the resolution, the oldest choice is the one that all of them can install.
    oldest = {name: min(found, key=Version) for name, found in sorted(versions.items())}
    pins = "".join(f'    "{name}=={version}",\n' for name, version in oldest.items())
    pyproject.write_text(BLOCK.sub(f"constraint-dependencies = [\n{pins}]\n", text))


if __name__ == "__main__":
    main()
