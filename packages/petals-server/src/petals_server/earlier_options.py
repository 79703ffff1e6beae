"""Options as earlier versions of Petals spelled them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from petals_core.addresses import Address
from petals_core.errors import ConfigurationError

_EARLIER_NAMES: Final = {
    "--block-indices": "--blocks",
    "--identity-path": "--identity",
    "--public-ip": "--announce-host",
}


def normalize_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line in today's spelling.

    Underscores in names of options count as hyphens, some options have other names now, and ``--initial_peers`` and
    ``--adapters`` may be followed by several values.
    """
    result: list[str] = []
    takes_peers = takes_adapters = False
    for position, argument in enumerate(arguments):
        if argument == "--":
            return result + list(arguments[position:])
        if argument.startswith("--"):
            name, separator, value = argument.partition("=")
            name = name.replace("_", "-")
            name = _EARLIER_NAMES.get(name, name)
            result.append(name + separator + value)
            takes_peers = name == "--initial-peers"
            takes_adapters = name == "--adapters"
            is_first = not separator
        elif takes_peers and (is_first or _is_address(argument)):
            result += [argument] if is_first else ["--initial-peers", argument]
            is_first = False
        elif takes_adapters and not argument.startswith("-"):
            result += [argument] if is_first else ["--adapters", argument]
            is_first = False
        else:
            takes_peers = takes_adapters = False
            result.append(argument)
    return result


def _is_address(text: str) -> bool:
    try:
        Address.parse(text)
    except ConfigurationError:
        return False
    return True
