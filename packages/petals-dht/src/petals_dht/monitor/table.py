"""The columns of the table of servers: which of them fit a width, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from petals_dht.monitor.figures import (
    Glyphs,
    count_text,
    delay_text,
    duration_text,
    rate_text,
    span_bar,
    sparkline,
    work_text,
)
from petals_dht.monitor.observations import SILENT
from petals_dht.monitor.view import ServerView

_GAP = 1
_MARGIN = 2
"""Cells before the first column, for marks."""
_SHORT_DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_DRAWING_STYLE = "cyan"
STATE_STYLES = {SILENT: "red", "joining": "yellow", "draining": "yellow", "online": "green"}
Cell: TypeAlias = Callable[[ServerView, int, int, Glyphs], str]
"""Text for a server; also gets the model's number of blocks and the column's width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column. Those with a low ``rank`` are the first to be shown when there is little room."""

    title: str
    rank: int
    width: int
    cell: Cell
    sort: str | None = None
    """What it is called when servers are sorted by it."""
    is_right: bool = False
    max_width: int | None = None
    """It may grow to that when there is room."""
    is_history: bool = False
    """It tells what was seen over time."""
    is_drawing: bool = False


COLUMNS = (
    Column(title="server", rank=0, width=12, max_width=28, sort="name", cell=lambda s, n, w, g: s.title),
    Column(title="blocks", rank=1, width=7, sort="blocks", cell=lambda s, n, w, g: f"{s.start}:{s.end}"),
    Column(
        title="where",
        is_drawing=True,
        rank=11,
        width=16,
        max_width=40,
        cell=lambda s, n, w, g: span_bar(s.start, s.end, n, w, g),
    ),
    Column(title="state", rank=2, width=8, sort="state", cell=lambda s, n, w, g: s.state),
    Column(
        title="tok/s", rank=3, width=6, sort="speed", is_right=True, cell=lambda s, n, w, g: rate_text(s.tokens_per_s)
    ),
    Column(
        title="speed",
        is_drawing=True,
        is_history=True,
        rank=15,
        width=8,
        max_width=16,
        cell=lambda s, n, w, g: sparkline(s.speeds, w, g),
    ),
    Column(title="dtype", rank=7, width=5, cell=lambda s, n, w, g: _SHORT_DTYPES.get(s.precision, s.precision)),
    Column(title="adapters", rank=13, width=8, max_width=24, cell=lambda s, n, w, g: ", ".join(s.adapters)),
    Column(
        title="cache",
        rank=4,
        width=6,
        sort="cache",
        is_right=True,
        cell=lambda s, n, w, g: count_text(s.cache_tokens_left),
    ),
    Column(title="load", rank=5, width=5, sort="load", is_right=True, cell=lambda s, n, w, g: rate_text(s.load)),
    Column(title="open", rank=10, width=4, is_right=True, cell=lambda s, n, w, g: count_text(s.num_sessions)),
    Column(
        title="use",
        is_drawing=True,
        is_history=True,
        rank=12,
        width=8,
        max_width=16,
        cell=lambda s, n, w, g: sparkline(s.sessions, w, g),
    ),
    Column(title="delay", rank=6, width=6, sort="delay", is_right=True, cell=lambda s, n, w, g: delay_text(s.delay_s)),
    Column(title="version", rank=8, width=7, max_width=12, sort="version", cell=lambda s, n, w, g: s.version),
    Column(
        title="seen", is_history=True, rank=14, width=4, is_right=True, cell=lambda s, n, w, g: duration_text(s.seen_s)
    ),
    Column(
        title="given",
        is_history=True,
        rank=9,
        width=5,
        sort="given",
        is_right=True,
        cell=lambda s, n, w, g: work_text(s.block_s),
    ),
    Column(title="address", rank=16, width=21, max_width=46, cell=lambda s, n, w, g: " ".join(s.addresses)),
)


def fit(width: int, *, has_history: bool = True) -> list[tuple[Column, int]]:
    """The columns that have room in ``width`` cells, each with its width."""
    room = width - _MARGIN
    chosen: list[Column] = []
    for column in sorted(COLUMNS, key=lambda column: column.rank):
        if column.is_history and not has_history:
            continue
        needed = column.width + (_GAP if chosen else 0)
        if needed > room:
            break
        chosen.append(column)
        room -= needed
    widths = {column.title: column.width for column in chosen}
    for column in chosen:
        grown = min(room, (column.max_width or column.width) - column.width)
        widths[column.title] += grown
        room -= grown
    return [(column, widths[column.title]) for column in COLUMNS if column in chosen]


def header(columns: Sequence[tuple[Column, int]], *, sort: str, is_reversed: bool, glyphs: Glyphs) -> Text:
    """The titles; the one sorted by has an arrow, if it fits."""
    line = Text(" " * _MARGIN, style="dim")
    for number, (column, width) in enumerate(columns):
        title = column.title
        if column.sort == sort:
            title = f"{title}{glyphs.up if is_reversed else glyphs.down}"
        is_marked = column.sort == sort
        line.append(_GAP * " " if number else "")
        line.append(padded(title, width, is_right=column.is_right, glyphs=glyphs), style="bold" if is_marked else "")
    return line


def row(
    server: ServerView,
    columns: Sequence[tuple[Column, int]],
    *,
    num_blocks: int,
    is_selected: bool,
    is_on_route: bool,
    glyphs: Glyphs,
) -> Text:
    """One server's line."""
    line = Text((glyphs.arrow if is_on_route else " ").ljust(_MARGIN), style="reverse" if is_selected else "")
    for number, (column, width) in enumerate(columns):
        style = _DRAWING_STYLE if column.is_drawing else ""
        if column.title == "state":
            style = STATE_STYLES[server.state]
        elif server.state == SILENT:
            style = "dim"
        if is_selected:
            style = ""
        line.append(_GAP * " " if number else "")
        text = column.cell(server, num_blocks, width, glyphs)
        line.append(padded(text, width, is_right=column.is_right, glyphs=glyphs), style=style)
    return line


def padded(text: str, width: int, *, is_right: bool = False, glyphs: Glyphs) -> str:
    """``text`` in exactly ``width`` cells, cut if it is longer."""
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + glyphs.cut
    return " " * (width - length) + text if is_right else text + " " * (width - length)
