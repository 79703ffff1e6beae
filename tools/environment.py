"""The environment that the tools run in: made, brought up to date and entered by the tools themselves.

Needs Python 3.11 or newer with pip, and nothing else: this module imports the standard library only. pip installs one
pinned uv into ``.uv``; uv installs the four packages and what they depend on into ``.venv``, in the versions that the
root ``pyproject.toml`` names. Both folders lie in the clone and are git-ignored.
"""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

UV_VERSION = "0.13.8"
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
BOOTSTRAP = ROOT / ".uv"
_READY = "PETALS_ENVIRONMENT_READY"
_EXECUTABLES = "Scripts" if os.name == "nt" else "bin"
_SUFFIX = ".exe" if os.name == "nt" else ""


class SetupError(Exception):
    """The environment can't be made; the text says what to do."""


def enter(*uv_sync_options: str) -> None:
    """Return inside the environment: where it is missing or stale, make it and start this script again in it.

    ``uv_sync_options`` choose what is installed beside the packages themselves, for example ``--all-groups``. What is
    there already stays, so that tools with different needs share the environment. Ends the process with one line on
    standard error if the environment can't be made.
    """
    if os.environ.pop(_READY, None) == str(ROOT):
        return
    try:
        python = synchronize(uv_sync_options)
    except SetupError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    command = [str(python), *sys.argv]
    variables = {**os.environ, _READY: str(ROOT)}
    if os.name == "nt":  # exec there returns to the shell before the new process has ended
        sys.exit(subprocess.call(command, env=variables))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, variables)


def synchronize(uv_sync_options: Sequence[str] = ()) -> Path:
    """Make the environment agree with the checkout and return its Python. Two processes do so one after the other.

    Raises:
        SetupError: this Python is too old, pip is missing, or an installation failed.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 - this file also runs where nothing has checked the version yet
        raise SetupError(f"Petals needs Python 3.11 or newer, and this is {sys.version.split()[0]}")
    BOOTSTRAP.mkdir(exist_ok=True)
    with _lock(BOOTSTRAP / "lock"):
        _ensure_uv()
        variables = _uv_variables()
        sync = [str(uv_path()), "sync", "--inexact", "--python", _base_python(), *uv_sync_options]
        if subprocess.call([*sync, "--check", "--quiet"], cwd=ROOT, env=variables, stderr=subprocess.DEVNULL) != 0:
            _say("Installing Petals into .venv (PyTorch is the largest part)")
            # Compiled now, because four processes that each compile what they import take minutes to start.
            _call([*sync, "--compile-bytecode"], "the installation failed: see uv's message above", variables)
    return ENVIRONMENT / _EXECUTABLES / f"python{_SUFFIX}"


def uv(*arguments: str, wheels: Path | None = None) -> None:
    """Run the pinned uv in the checkout with pip's settings; ``synchronize`` has installed it.

    ``wheels`` is a folder to take distributions from beside the configured places.

    Raises:
        SetupError: uv failed; it has said why.
    """
    variables = _uv_variables()
    if wheels is not None:
        variables["UV_FIND_LINKS"] = ",".join(filter(None, [str(wheels), variables.get("UV_FIND_LINKS")]))
    _call([str(uv_path()), *arguments], f"uv {arguments[0]} failed: see its message above", variables)


def uv_settings(pip_settings: Mapping[str, str]) -> dict[str, str]:
    """Translate pip's settings, which uv does not read, into uv's environment variables.

    Only what says where packages come from: the index that replaces the default one, local folders or pages of wheels,
    and the certificates to trust. Further indexes are left out because uv takes the first index that knows a name,
    where pip takes the best version of all.
    """
    settings: dict[str, str] = {}
    if index := pip_settings.get("index-url"):
        settings["UV_DEFAULT_INDEX"] = index
    if places := pip_settings.get("find-links", "").split():
        settings["UV_FIND_LINKS"] = ",".join(places)
    if certificates := pip_settings.get("cert"):
        settings["SSL_CERT_FILE"] = certificates
    return settings


def uv_path() -> Path:
    """Where the pinned uv is, once ``synchronize`` has returned."""
    return BOOTSTRAP / UV_VERSION / "bin" / f"uv{_SUFFIX}"


def _pip_settings() -> dict[str, str]:
    """pip's own settings for ``pip install``: environment variables first, then that command's section, then global."""
    listed = subprocess.run(
        [_base_python(), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        name, separator, literal = line.partition("=")
        section, _, key = name.partition(".")
        if separator and section in found:
            with contextlib.suppress(ValueError, SyntaxError):
                found[section][key] = str(ast.literal_eval(literal))
    return {**found["global"], **found["install"], **found[":env:"]}


def _uv_variables() -> dict[str, str]:
    """The environment variables that uv runs with; what the user has set for uv counts before pip's settings."""
    return {
        **uv_settings(_pip_settings()),
        **_without(os.environ, "VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH"),
        "UV_PROJECT_ENVIRONMENT": str(ENVIRONMENT),
        "UV_PYTHON_DOWNLOADS": "never",
    }


def _ensure_uv() -> None:
    """Install the pinned uv unless it is there; a folder appears only when it is complete."""
    if not uv_path().exists():
        _say(f"Installing uv {UV_VERSION} into .uv")
        partial = BOOTSTRAP / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        _call(
            [_base_python(), "-m", "pip", "install", "--quiet", "--target", str(partial), f"uv=={UV_VERSION}"],
            "pip could not install uv: see its message above (Petals needs Python with pip)",
            {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"},
        )
        for stale in BOOTSTRAP.glob("*.*.*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial.rename(BOOTSTRAP / UV_VERSION)


def _base_python() -> str:
    """The Python under any virtual environment, so that the environment never stands on itself."""
    return str(getattr(sys, "_base_executable", sys.executable))


def _call(command: Sequence[str], complaint: str, variables: Mapping[str, str]) -> None:
    # Standard output stays the tool's own.
    if subprocess.call(command, cwd=ROOT, env=dict(variables), stdout=sys.stderr) != 0:
        raise SetupError(complaint)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _without(variables: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold ``path`` against other processes; the system lets go of it when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: there uv's own lock has to do
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("Waiting for another process that is setting up the environment")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
