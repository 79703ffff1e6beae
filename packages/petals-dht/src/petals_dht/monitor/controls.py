"""What the user of a monitor has chosen, and how keys change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from petals_core.identity import PeerId
from petals_dht.monitor.view import SORTS

_MAX_FILTER_CHARS = 40
_ORDER = tuple(SORTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """The state of the keyboard's side of a monitor."""

    model: int = 0
    """Which of the models is in view."""
    sort: str = _ORDER[0]
    is_reversed: bool = False
    wanted: str = ""
    """Only servers that match it."""
    is_typing: bool = False
    """Characters go into ``wanted``."""
    selected: PeerId | None = None
    """None: the first one."""
    is_open: bool = False
    """The selected server is shown alone."""
    is_over: bool = False


def press(controls: Controls, key: str, *, rows: Sequence[PeerId], num_models: int, page: int) -> Controls:
    """The state after a key. ``rows`` are the servers in the order in which they are shown, ``page`` how many fit."""
    if key == "interrupt":
        return replace(controls, is_over=True)
    if controls.is_typing:
        return _type(controls, key)
    match key:
        case "q":
            return replace(controls, is_open=False) if controls.is_open else replace(controls, is_over=True)
        case "escape" | "backspace" | "left":
            return replace(controls, is_open=False) if controls.is_open else replace(controls, wanted="")
        case "enter" | "right":
            return replace(controls, is_open=bool(rows), selected=selected_of(controls, rows))
        case "/":
            return replace(controls, is_typing=True, is_open=False)
        case "s" | "S":
            step = 1 if key == "s" else -1
            sort = _ORDER[(_ORDER.index(controls.sort) + step) % len(_ORDER)]
            return replace(controls, sort=sort, is_reversed=False)
        case "r":
            return replace(controls, is_reversed=not controls.is_reversed)
        case "tab" | "back tab":
            step = 1 if key == "tab" else -1
            return replace(controls, model=(controls.model + step) % max(1, num_models), selected=None, is_open=False)
    return _move(controls, key, rows, page)


def selected_of(controls: Controls, rows: Sequence[PeerId]) -> PeerId | None:
    """The selected server, if it is still there, else the first."""
    if controls.selected in rows:
        return controls.selected
    return rows[0] if rows else None


def _type(controls: Controls, key: str) -> Controls:
    match key:
        case "enter":
            return replace(controls, is_typing=False)
        case "escape":
            return replace(controls, is_typing=False, wanted="")
        case "backspace":
            return replace(controls, wanted=controls.wanted[:-1])
    if len(key) == 1 and len(controls.wanted) < _MAX_FILTER_CHARS:
        return replace(controls, wanted=controls.wanted + key)
    return controls


def _move(controls: Controls, key: str, rows: Sequence[PeerId], page: int) -> Controls:
    selected = selected_of(controls, rows)
    if selected is None:
        return controls
    steps = {
        "up": -1, "k": -1, "down": 1, "j": 1, "page up": -page, "page down": page, " ": page,
        "home": -len(rows), "g": -len(rows), "end": len(rows), "G": len(rows),
    }  # fmt: skip
    if key not in steps:
        return controls
    index = min(max(0, rows.index(selected) + steps[key]), len(rows) - 1)
    return replace(controls, selected=rows[index])
