"""Draws a view: lines of text for a given size, with nothing read or written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.cells import cell_len
from rich.text import Text

from petals_core.identity import PeerId
from petals_dht.monitor import table
from petals_dht.monitor.controls import Controls, selected_of
from petals_dht.monitor.figures import (
    UNICODE,
    Glyphs,
    count_text,
    delay_text,
    duration_text,
    rate_text,
    ruler,
    span_bar,
    sparkline,
    work_text,
)
from petals_dht.monitor.view import ModelView, RouteView, ServerView, SwarmView, arrange
from petals_dht.overview import strip_of

MIN_WIDTH = 60
MIN_HEIGHT = 16
_STALE_S = 30.0
_MAX_STRIP = 160
_LABEL = 8
"""Cells before the lines of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """What is drawn on."""

    width: int
    height: int | None
    """None: as many lines as it takes."""
    glyphs: Glyphs = UNICODE


def is_too_small(width: int, height: int) -> bool:
    """Whether a terminal has too little room for the view."""
    return width < MIN_WIDTH or height < MIN_HEIGHT


def rows_of(view: SwarmView, controls: Controls) -> list[ServerView]:
    """The servers in the table, in their order."""
    model = model_of(view, controls)
    if model is None:
        return []
    return arrange(model.servers, sort=controls.sort, is_reversed=controls.is_reversed, wanted=controls.wanted)


def model_of(view: SwarmView, controls: Controls) -> ModelView | None:
    """The model in view."""
    return view.models[controls.model % len(view.models)] if view.models else None


def draw(view: SwarmView, controls: Controls, canvas: Canvas, *, clock: str) -> list[Text]:
    """The whole screen: at most ``height`` lines of at most ``width`` cells. ``clock`` is the time of day as text."""
    height = canvas.height or 10_000
    if is_too_small(canvas.width, height):
        return [Text(f"at least {MIN_WIDTH} x {MIN_HEIGHT} is needed"[: canvas.width])]
    lines = [_header(view, canvas, clock)]
    model = model_of(view, controls)
    if model is None:
        nobody = Text("no server is online: start one with 'petals-server serve MODEL'", style="yellow")
        lines.append(_cut(nobody, canvas))
        return [*lines, *_blank(height - len(lines) - 1), _footer(controls, canvas, num_rows=0, num_models=0)]
    rows = rows_of(view, controls)
    selected = selected_of(controls, [server.peer_id for server in rows])
    opened = next((server for server in rows if server.peer_id == selected), None) if controls.is_open else None
    if opened is not None:
        lines += [Text(""), *_details(opened, model, canvas)]
    else:
        if len(view.models) > 1:
            lines += _model_list(view.models, controls.model % len(view.models), canvas, max_lines=max(3, height // 8))
        lines += [*_model_head(model, canvas), *_alerts(model, canvas, max_lines=max(2, height // 8))]
        lines += _table(model, rows, selected, controls, canvas, room=height - len(lines) - 1)
    lines = lines[: height - 1]
    return [
        *lines,
        *_blank(height - 1 - len(lines)),
        _footer(controls, canvas, num_rows=len(rows), num_models=len(view.models)),
    ]


def draw_once(view: SwarmView, canvas: Canvas, *, clock: str) -> list[Text]:
    """Everything of all models, for a terminal's scroll-back or a pipe."""
    lines = [_header(view, canvas, clock)]
    for model in view.models:
        lines += [Text(""), *_model_head(model, canvas), *_alerts(model, canvas, max_lines=100)]
        lines += _table(
            model,
            arrange(model.servers),
            None,
            Controls(),
            canvas,
            room=len(model.servers) + 1,
            has_history=False,
        )
    return [_rstripped(line) for line in lines]


def page_size(view: SwarmView, controls: Controls, canvas: Canvas) -> int:
    """How many servers fit the table, about."""
    model = model_of(view, controls)
    if model is None or canvas.height is None:
        return 1
    return max(1, canvas.height - 12 - min(len(model.alerts), max(2, canvas.height // 8)))


# --- parts ------------------------------------------------------------------------------------------------------------


def _header(view: SwarmView, canvas: Canvas, clock: str) -> Text:
    glyphs = canvas.glyphs
    num_servers = sum(len(model.servers) for model in view.models)
    left = Text.assemble(
        ("Petals swarm", "bold"),
        f"  {_plural(len(view.models), 'model')} {glyphs.dot} {_plural(num_servers, 'server')}",
    )
    if view.age_s is None:
        right = Text("looking ...", style="yellow")
    elif view.trouble or view.age_s > _STALE_S:
        right = Text(f"no node answers, seen {duration_text(view.age_s)} ago", style="bold red")
    else:
        right = Text(clock, style="dim")
    left.append(" " * max(1, canvas.width - left.cell_len - right.cell_len))
    return _cut(left + right, canvas)


def _model_list(models: Sequence[ModelView], selected: int, canvas: Canvas, *, max_lines: int) -> list[Text]:
    glyphs = canvas.glyphs
    first = max(0, min(selected - max_lines // 2, len(models) - max_lines))
    name_width = min(28, max(cell_len(model.model.model_name) for model in models))
    strip_width = min(64, canvas.width - name_width - 26)
    lines = []
    for number in range(first, min(first + max_lines, len(models))):
        model = models[number]
        line = Text("> " if number == selected else "  ", style="bold" if number == selected else "")
        line.append(table.padded(model.model.model_name, name_width, glyphs=glyphs) + " ")
        line.append_text(_strip(model.coverage, strip_width, glyphs))
        line.append(f" {_plural(len(model.servers), 'server')}")
        dark = sum(end - start for start, end in model.dark)
        line.append(f" {dark} dark" if dark else "", style="red")
        lines.append(_cut(line, canvas))
    return [*lines, Text("")]


def _model_head(model: ModelView, canvas: Canvas) -> list[Text]:
    glyphs, summary = canvas.glyphs, model.model
    width = min(_MAX_STRIP, canvas.width - _LABEL)
    dark = sum(end - start for start, end in model.dark)
    title = Text.assemble(
        (summary.model_name, "bold"),
        f"  {_plural(summary.num_blocks, 'block')}  {summary.fingerprint[:12]}  ",
        (f"{glyphs.bad} {dark} dark", "bold red") if dark else (f"{glyphs.good} complete", "green"),
    )
    lines = [_cut(title, canvas), _labelled("held by", _strip(model.coverage, width, glyphs), canvas)]
    lines.append(_labelled("block", Text(ruler(summary.num_blocks, width), style="dim"), canvas))
    speed = Text.assemble(
        (f"{rate_text(model.bound_tokens_per_s) or '?'} tok/s ", "bold"),
        (sparkline(model.bounds, min(40, canvas.width - 50), glyphs), "cyan"),
        ("  announced for the weakest block", "dim"),
    )
    lines.append(_labelled("speed", speed, canvas))
    lines.append(_labelled("route", _route(model.route, canvas.width - _LABEL, glyphs), canvas))
    return lines


def _strip(coverage: Sequence[int], width: int, glyphs: Glyphs) -> Text:
    strip = Text()
    for character, group in groupby(strip_of(coverage, width)):
        style = "bold red" if character == "·" else "yellow" if character == "1" else "green"
        strip.append((glyphs.dark if character == "·" else character) * len(list(group)), style=style)
    return strip


def _route(route: RouteView | None, width: int, glyphs: Glyphs) -> Text:
    """The time of a token and the chain; hops in the middle give way where there is no room."""
    if route is None:
        return Text("none: blocks are missing", style="red")
    names = [f"{hop.title} {hop.start}:{hop.end}" for hop in route.hops]
    head = f"about {delay_text(route.step_s)} a token by "
    arrow = f" {glyphs.arrow} "
    shown = list(names)
    while len(shown) > 2 and cell_len(head + arrow.join(shown)) + (9 if len(shown) < len(names) else 0) > width:
        shown.pop(len(shown) // 2)
    left_out = len(names) - len(shown)
    if left_out:
        shown.insert(len(shown) // 2 + len(shown) % 2, f"{left_out} more")
    return Text.assemble((head, "dim"), arrow.join(shown))


def _alerts(model: ModelView, canvas: Canvas, *, max_lines: int) -> list[Text]:
    glyphs = canvas.glyphs
    shown = model.alerts if len(model.alerts) <= max_lines else model.alerts[: max_lines - 1]
    lines = [
        _cut(
            Text(
                f"{glyphs.bad if alert.is_bad else glyphs.warning} {alert.text}",
                style="bold red" if alert.is_bad else "yellow",
            ),
            canvas,
        )
        for alert in shown
    ]
    left_out = len(model.alerts) - len(shown)
    if left_out:
        lines.append(Text(f"{glyphs.warning} {left_out} more warnings", style="yellow"))
    return lines


def _table(
    model: ModelView,
    rows: Sequence[ServerView],
    selected: PeerId | None,
    controls: Controls,
    canvas: Canvas,
    *,
    room: int,
    has_history: bool = True,
) -> list[Text]:
    columns = table.fit(canvas.width, has_history=has_history)
    lines = [table.header(columns, sort=controls.sort, is_reversed=controls.is_reversed, glyphs=canvas.glyphs)]
    if not rows:
        return [*lines, Text(f"no server matches {controls.wanted!r}", style="yellow")]
    room -= 1
    is_cut = len(rows) > room
    num_shown = max(1, room - 1) if is_cut else len(rows)
    index = next((number for number, server in enumerate(rows) if server.peer_id == selected), 0)
    first = max(0, min(index - num_shown // 2, len(rows) - num_shown))
    on_route = {hop.peer_id for hop in model.route.hops} if model.route is not None else set()
    lines += [
        table.row(
            server,
            columns,
            num_blocks=model.model.num_blocks,
            is_selected=server.peer_id == selected,
            is_on_route=server.peer_id in on_route,
            glyphs=canvas.glyphs,
        )
        for server in rows[first : first + num_shown]
    ]
    if is_cut:
        lines.append(Text(f"  {first + 1} to {first + num_shown} of {len(rows)}", style="dim"))
    return lines


def _details(server: ServerView, model: ModelView, canvas: Canvas) -> list[Text]:
    """Everything about one server."""
    glyphs = canvas.glyphs
    width = canvas.width - 12
    asked = "not asked yet" if server.delay_s is None and not server.failure else "answers"
    fields: list[tuple[str, str]] = [
        ("peer id", str(server.peer_id)),
        ("address", " ".join(server.addresses) or "none"),
        ("state", f"{server.state}, {server.failure or asked}"),
        ("blocks", f"{server.start}:{server.end} of {model.model.num_blocks}{_intent_text(server)}"),
        ("", span_bar(server.start, server.end, model.model.num_blocks, min(width, _MAX_STRIP), glyphs)),
        ("computes", f"{server.precision}, {_per_s(server.tokens_per_s)} for one session"),
        ("", f"{_per_s(server.forward_tokens_per_s)} for many tokens at once"),
        ("speed", sparkline(server.speeds, min(width, 60), glyphs)),
        ("adapters", ", ".join(server.adapters) or "none"),
        ("cache", f"{count_text(server.cache_tokens_left) or '?'} tokens free"),
        ("load", f"{rate_text(server.load) or '?'} waiting, {count_text(server.num_sessions) or '?'} sessions open"),
        ("sessions", sparkline(server.sessions, min(width, 60), glyphs)),
        ("delay", f"{delay_text(server.delay_s) or 'not measured'} there and back"),
        ("version", server.version or "?"),
        ("given", f"{work_text(server.block_s)} block-hours, {work_text(server.session_s)} session-hours "
                  f"in {duration_text(server.seen_s)} of watching"),
        ("announced", f"{duration_text(server.age_s)} ago, for {duration_text(server.expires_in_s)} more"),
    ]  # fmt: skip
    lines = [_cut(Text(server.title, style="bold underline"), canvas)]
    return lines + [_cut(Text.assemble((label.ljust(11), "dim"), value), canvas) for label, value in fields]


def _intent_text(server: ServerView) -> str:
    return "" if server.intent is None else ", about to hold {}:{}".format(*server.intent)


def _footer(controls: Controls, canvas: Canvas, *, num_rows: int, num_models: int) -> Text:
    if controls.is_typing:
        return _cut(Text.assemble(("show only: ", "bold"), controls.wanted, ("_", "blink")), canvas)
    if controls.is_open:
        keys = [("esc", "back"), ("q", "back")]
    else:
        keys = [("s", f"sort: {controls.sort}"), ("r", "reverse"), ("/", "filter")]
        keys += [("enter", "open"), ("↑↓" if canvas.glyphs is UNICODE else "j k", "select")] if num_rows else []
        keys += [("tab", "model")] if num_models > 1 else []
        keys.append(("q", "quit"))
    line = Text()
    if controls.wanted and not controls.is_open:
        line.append(f"only {controls.wanted!r} (esc: all)  ", style="bold")
    for key, meaning in keys:
        line.append(key, style="bold")
        line.append(f" {meaning}  ", style="dim")
    return _cut(line, canvas)


# --- text -------------------------------------------------------------------------------------------------------------


def _labelled(label: str, content: Text, canvas: Canvas) -> Text:
    return _cut(Text.assemble((label.ljust(_LABEL), "dim"), content), canvas)


def _cut(line: Text, canvas: Canvas) -> Text:
    """A line that fits; what is cut ends in a sign of it."""
    if line.cell_len <= canvas.width:
        return line
    line = line.copy()
    line.truncate(canvas.width - 1, overflow="crop")
    line.append(canvas.glyphs.cut)
    return line


def _rstripped(line: Text) -> Text:
    line = line.copy()
    line.rstrip()
    return line


def _blank(count: int) -> Iterable[Text]:
    return (Text("") for _ in range(count))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _per_s(rate: float | None) -> str:
    return f"{rate_text(rate) or '?'} tokens/s"
