"""Names of adapters: what people call one, and eight hex digits that say which one it is.

A server announces ``poems@1f2e3d4c``. Clients ask for ``poems`` where only one is served under that name, or for the
whole name; so two servers with different adapters of one name never compute for the same request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from petals_core.errors import ConfigurationError

_NAME: Final = re.compile(r"[\w.-]{1,48}(/[\w.-]{1,48})?")
_DIGEST: Final = re.compile(r"[0-9a-f]{8}")


def name_adapter(name: str, digest: str, *, where: str) -> str:
    """The whole name of an adapter; raises ``ConfigurationError`` if ``name`` can't be one."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"adapter {where} can't be called {name[:60]!r}: give NAME=PATH with a name of at most 48 letters, digits, "
            "'.', '_' and '-'"
        )
    return f"{name}@{digest}"


def is_meant(wanted: str, announced: str) -> bool:
    """Whether ``announced``, a whole name, is what a client asks for."""
    name, _, digest = announced.rpartition("@")
    return bool(_DIGEST.fullmatch(digest)) and wanted in (announced, name)


def find_meant(wanted: str, announced: Iterable[str]) -> tuple[str, ...]:
    """Those of many whole names that a client may mean, each once, in order."""
    return tuple(sorted({each for each in announced if is_meant(wanted, each)}))
