"""Build the four wheels and install them in a fresh environment: first the client's, which is complete and no more.

``python3 tools/check_packages.py``; everything happens in a temporary folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import environment

MEMBERS = {"petals-core", "petals-dht", "petals-server", "petals-client"}
CLIENT_NEEDS = {"petals-core", "petals-dht", "petals-client"}
CLIENT_REFUSES = ("petals-server", "bitsandbytes")
PROGRAMS = ("petals-client", "petals-dht", "petals-server")
# Runs in the fresh environment, so with nothing but what the client's wheel asks for.
PROBE = """
import importlib.metadata, petals_client
print(*sorted(distribution.name.lower() for distribution in importlib.metadata.distributions()))
"""


def check_wheel(path: Path) -> str:
    """Return the name of the wheel's distribution; it holds its type marker, its license and no tests."""
    name = path.name.partition("-")[0]
    files = zipfile.ZipFile(path).namelist()
    for wanted in (f"{name}/__init__.py", f"{name}/py.typed"):
        assert wanted in files, f"{path.name} lacks {wanted}"
    assert any(file.endswith("licenses/LICENSE") for file in files), f"{path.name} lacks its license"
    strangers = [file for file in files if not file.startswith((f"{name}/", f"{name}-"))]
    assert not strangers, f"{path.name} also holds {strangers}"
    return name.replace("_", "-")


def main() -> None:
    environment.enter("--all-groups")
    with tempfile.TemporaryDirectory() as temporary:
        wheels, fresh = Path(temporary, "wheels"), Path(temporary, "fresh")
        environment.uv("build", "--all-packages", "--wheel", "--quiet", "--out-dir", str(wheels))
        built = {check_wheel(path) for path in wheels.glob("*.whl")}
        assert built == MEMBERS, f"built {sorted(built)}"
        print(f"built {', '.join(sorted(built))}")

        environment.uv("venv", "--quiet", "--python", sys.executable, str(fresh))
        python = str(fresh / ("Scripts" if os.name == "nt" else "bin") / "python")
        environment.uv("pip", "install", "--quiet", "--python", python, "petals-client", wheels=wheels)
        installed = set(subprocess.check_output([python, "-c", PROBE], text=True, cwd=temporary).split())
        assert installed >= CLIENT_NEEDS, f"missing: {CLIENT_NEEDS - installed}"
        assert not installed.intersection(CLIENT_REFUSES), "the client pulled in what only servers need"
        print(
            f"petals-client installs alone: {len(installed)} distributions, none of {', '.join(sorted(CLIENT_REFUSES))}"
        )

        environment.uv("pip", "install", "--quiet", "--python", python, "petals-server", wheels=wheels)
        for program in PROGRAMS:
            usage = subprocess.check_output([Path(python).parent / program, "--help"], text=True, cwd=temporary)
            assert program in usage, usage
        print(f"petals-server installs too; {', '.join(PROGRAMS)} run")


if __name__ == "__main__":
    main()
