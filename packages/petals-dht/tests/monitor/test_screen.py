from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from petals_dht.monitor import table
from petals_dht.monitor.controls import Controls
from petals_dht.monitor.figures import ASCII
from petals_dht.monitor.screen import Canvas, draw, draw_once, rows_of
from petals_dht.monitor.view import SwarmView
from petals_dht.testing import make_announcement

NOW_S = 1_800_000_000.0
See = Callable[..., SwarmView]
SIZES = [(60, 16), (80, 24), (120, 40), (200, 60), (400, 20)]


def many(see: See, count: int = 60) -> SwarmView:
    names = ["研究室のサーバー", "x" * 60, "", "🚀 rocket", "lab"]
    return see(
        *(
            make_announcement(
                now_s=NOW_S,
                start=number % 9,
                end=number % 9 + 3,
                public_name=f"{names[number % 5]}{number}" if number % 5 != 2 else "",
                inference_tokens_per_s=float(number),
                cache_tokens_left=number * 1000,
                version="0.2.0" if number else "0.1.0",
                adapters=("poems",),
            )
            for number in range(count)
        ),
        failures={"lab4": "connection refused"},
    )


def text_of(lines: list[Text]) -> str:
    return "\n".join(line.plain for line in lines)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("is_open", [False, True])
def test_the_screen_is_exactly_filled(see: See, width: int, height: int, is_open: bool) -> None:
    for view in (many(see), many(see, 3), see()):
        servers = [server.peer_id for model in view.models for server in model.servers] if is_open else []
        for selected in servers or [None]:
            controls = Controls(is_open=is_open, selected=selected)
            lines = draw(view, controls, Canvas(width=width, height=height), clock="12:00:00")
            assert len(lines) == height
            assert max(cell_len(line.plain) for line in lines) <= width


def test_every_size_has_a_picture_or_a_line(see: See) -> None:
    view = many(see, 3)
    for width in range(1, 130):
        for height in (1, 15, 16, 25):
            lines = draw(view, Controls(), Canvas(width=width, height=height), clock="12:00:00")
            assert len(lines) == (height if width >= 60 and height >= 16 else 1)
            assert all(cell_len(line.plain) <= width for line in lines)


def test_what_80_columns_show(see: See) -> None:
    view = see(
        make_announcement(now_s=NOW_S, start=0, end=8, public_name="attic", inference_tokens_per_s=41.0),
        make_announcement(now_s=NOW_S, start=7, end=12, public_name="lab", state="draining"),
    )
    text = text_of(draw(view, Controls(), Canvas(width=80, height=24), clock="12:00:00"))
    assert "test-model  12 blocks" in text
    assert "✖ 4 dark" in text
    assert "held by 11111111····" in text
    assert "route   none: blocks are missing" in text
    for word in ("attic", "0:8", "online", "41", "fp32", "20ms", "lab", "draining", "12:00:00"):
        assert word in text


def test_the_selected_server_is_always_in_view(see: See) -> None:
    view = many(see)
    canvas = Canvas(width=80, height=24)
    for server in rows_of(view, Controls()):
        lines = draw(view, Controls(selected=server.peer_id), canvas, clock="")
        (selected,) = [line for line in lines if "reverse" in str(line.style)]
        assert f"{server.start}:{server.end}" in selected.plain


def test_no_data_for_a_while_is_said(see: See) -> None:
    import dataclasses

    stale = dataclasses.replace(many(see, 3), age_s=90.0, trouble="no node of the swarm answers any more")
    lines = draw(stale, Controls(), Canvas(width=80, height=24), clock="12:00:00")
    assert "no node answers, seen 1m ago" in lines[0].plain


def test_a_filter_that_nobody_matches(see: See) -> None:
    text = text_of(draw(many(see), Controls(wanted="zzz"), Canvas(width=80, height=24), clock=""))
    assert "no server matches 'zzz'" in text
    assert "only 'zzz' (esc: all)" in text


def test_ascii_and_no_colour(see: See) -> None:
    view = see(make_announcement(now_s=NOW_S, start=0, end=8, public_name="attic"))
    console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    for line in draw(view, Controls(), Canvas(width=80, height=24, glyphs=ASCII), clock="12:00:00"):
        console.print(line)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert output.isascii()
    codes = set(re.findall(r"\x1b\[([0-9;]*)m", output))
    assert codes <= {"0", "1", "2", "1;2", "7"}, "bold, dim and reverse only"
    assert "11111111...." in re.sub(r"\x1b\[[0-9;]*m", "", output)


def test_printing_once_shows_every_server(see: See) -> None:
    view = many(see)
    text = text_of(draw_once(view, Canvas(width=80, height=None), clock="12:00:00"))
    assert all(f"rocket{number}" in text for number in range(3, 60, 5))
    assert len(text.splitlines()) > 60
    assert "given" not in text, "there is nothing to tell of one look"
    assert text == "\n".join(line.rstrip() for line in text.splitlines())


def test_columns_come_by_their_rank() -> None:
    for width in range(60, 260):
        columns = table.fit(width)
        ranks = sorted(column.rank for column, _ in columns)
        assert ranks == list(range(len(ranks)))
        assert 2 + sum(size for _, size in columns) + len(columns) - 1 <= width
    assert [column.title for column, _ in table.fit(260)] == [column.title for column in table.COLUMNS]
