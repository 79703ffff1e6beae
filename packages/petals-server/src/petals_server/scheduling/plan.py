"""What one turn of the device computes: a value, made by the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from petals_server.cache.pages import PageCopy, PageRun

if TYPE_CHECKING:
    from petals_server.scheduling.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPart:
    """Some tokens of one row: those of its request from ``start`` on, behind ``past`` tokens in the cache."""

    row: int
    start: int
    count: int
    past: int
    runs: tuple[PageRun, ...]
    """Its pages in each group, room for the new tokens included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """What a request gets ready for a turn."""

    rows: tuple[RowPart, ...]
    copies: tuple[PageCopy, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """A request's tokens in a turn; prefill and decode differ in their number alone."""

    request: Request
    num_tokens: int
    rows: tuple[RowPart, ...]
    copies: tuple[PageCopy, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """The requests of one turn, all of one key, or a single one without."""

    parts: tuple[Part, ...]

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)
