"""What the command-line programs share: errors in one line, addresses as options, and a console beside the output.

Results go to stdout, so that they can be piped; everything else (errors, progress, advice) goes to stderr.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, NoReturn, Protocol, runtime_checkable

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError, PetalsError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_ERROR = 2
"""Exit code of every error that is explained to the user."""
EXIT_BUG = 1
"""Exit code of an error that nobody foresaw."""
EXIT_INTERRUPTED = 130
HELP_WIDTH = 100
"""Columns that help takes at the most."""


@runtime_checkable
class _UsageError(Protocol):
    """What Typer and Click raise for wrong options, whichever of them is installed."""

    exit_code: int

    def format_message(self) -> str: ...


def run_app(app: Callable[..., object]) -> NoReturn:
    """Run a Typer app as a program and exit: 0 when it returns, 2 after an error, told in one line on stderr.

    ``--verbose`` anywhere on the command line shows tracebacks too.
    """
    code: object = None
    with one_line_errors(verbose="--verbose" in sys.argv):
        code = app(standalone_mode=False)
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def one_line_errors(*, verbose: bool) -> Iterator[None]:
    """End the program (``SystemExit``) after an exception, with one line ``error: ...`` on stderr and no traceback.

    Errors that are meant for the user exit with 2, an interrupt with 130, anything else with 1.
    """
    try:
        yield
    except PetalsError as error:
        _fail(error.message, EXIT_ERROR, verbose=verbose)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output (``| head``) has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a command without arguments: its message is the help
            print(getattr(error, "message", error), file=sys.stderr)
            sys.exit(EXIT_ERROR)
        if isinstance(error, _UsageError):
            _fail(f"{error.format_message()} (--help shows what is possible)", error.exit_code, verbose=verbose)
        if type(error).__name__ == "Abort":  # Typer's own way to say that a prompt was interrupted
            sys.exit(EXIT_INTERRUPTED)
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "" if verbose else " (this is a bug: --verbose shows where)"
        _fail(f"unexpected {text}{hint}", EXIT_BUG, verbose=verbose)


def _fail(message: str, code: int, *, verbose: bool) -> NoReturn:
    if verbose:
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def stderr_console() -> Console:
    """A rich console for progress and advice, which leaves stdout to the results."""
    from rich.console import Console  # Costs 50 ms, so only who wants it pays.

    return Console(stderr=True, highlight=False)


def describe_version(package: str) -> str:
    """One line: the version of a package, and of what decides most about how it computes."""
    parts = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in ("torch", "transformers"))]
    return f"{package} {version(package)} ({', '.join(parts)})"


def parse_addresses(texts: Iterable[str]) -> tuple[Address, ...]:
    """Read a repeatable ``HOST:PORT`` option; each value may also be a list separated by commas or blanks.

    Duplicates count once; the order stays.

    Raises:
        ConfigurationError: a part is no address.
    """
    parts = [part for text in texts for part in text.replace(",", " ").split()]
    return tuple(dict.fromkeys(Address.parse(part) for part in parts))


def parse_connectable_addresses(texts: Iterable[str], *, option: str) -> tuple[Address, ...]:
    """As ``parse_addresses``, for addresses that somebody is to connect to, so wildcards are refused.

    Raises:
        ConfigurationError: a part is no address, or nobody can connect to it.
    """
    addresses = parse_addresses(texts)
    for address in addresses:
        if address.is_unspecified:
            raise ConfigurationError(f"{option} {address}: nobody can connect to a wildcard address; give a real one")
    return addresses
