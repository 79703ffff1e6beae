from __future__ import annotations

from petals_core.identity import PeerId
from petals_dht.monitor.controls import Controls, press, selected_of
from petals_dht.monitor.view import SORTS

ROWS = [PeerId(bytes([number]) * 32) for number in range(5)]


def press_all(*keys: str, controls: Controls | None = None, rows: list[PeerId] = ROWS) -> Controls:
    controls = controls or Controls()
    for key in keys:
        controls = press(controls, key, rows=rows, num_models=3, page=3)
    return controls


def test_moving_stays_within_the_rows() -> None:
    assert selected_of(Controls(), ROWS) == ROWS[0]
    assert press_all("down", "j").selected == ROWS[2]
    assert press_all("down", "up", "up").selected == ROWS[0]
    assert press_all("page down", "page down").selected == ROWS[4]
    assert press_all("end", "k").selected == ROWS[3]
    assert press_all("down", rows=[]).selected is None


def test_the_selected_server_stays_selected_wherever_it_moves() -> None:
    controls = press_all("down")
    assert selected_of(controls, ROWS[::-1]) == ROWS[1]
    assert selected_of(controls, [ROWS[3], ROWS[4]]) == ROWS[3]


def test_sorting() -> None:
    names = [Controls().sort]
    controls = press_all("r")
    assert controls.is_reversed
    for _ in SORTS:
        controls = press_all("s", controls=controls)
        assert not controls.is_reversed
        names.append(controls.sort)
    assert names == [*SORTS, next(iter(SORTS))]
    assert press_all("S").sort == [*SORTS][-1]


def test_filtering() -> None:
    controls = press_all("/", "q", "s", "x", "backspace")
    assert (controls.wanted, controls.is_typing, controls.is_over) == ("qs", True, False)
    controls = press_all("enter", controls=controls)
    assert (controls.wanted, controls.is_typing, controls.is_open) == ("qs", False, False)
    assert press_all("escape", controls=controls).wanted == ""
    assert press_all("/", "a", "escape").wanted == ""
    assert len(press_all("/", *"x" * 100).wanted) == 40


def test_opening_and_leaving() -> None:
    opened = press_all("down", "enter")
    assert (opened.is_open, opened.selected) == (True, ROWS[1])
    assert not press_all("enter", rows=[]).is_open
    assert not press_all("q", controls=opened).is_over
    assert press_all("q", "q", controls=opened).is_over
    assert press_all("interrupt", controls=press_all("/")).is_over


def test_models_take_turns() -> None:
    assert [press_all(*["tab"] * count).model for count in range(4)] == [0, 1, 2, 0]
    assert press_all("back tab").model == 2
