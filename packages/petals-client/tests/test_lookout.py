"""Who is given up when all answer and nothing comes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from petals_client.lookout import credible, find_slow
from petals_core.wire.messages import Progress


def hops(handed_on: dict[int, int] | None = None) -> Any:
    """Three servers; those named gave the client steps up to a number, because they can't reach the next."""
    handed_on = handed_on or {}
    return [SimpleNamespace(is_cut_off=index in handed_on, handed_on=handed_on.get(index, -1)) for index in range(3)]


def progress(*states: tuple[int | None, int | None]) -> list[Progress]:
    return [Progress(attempt=1, received=received, computed=computed) for received, computed in states]


NOTHING = (None, None)


@pytest.mark.parametrize(
    ("states", "handed_on", "source", "slow"),
    [
        ((NOTHING, NOTHING, NOTHING), None, -1, 0),
        (((3, 3), (3, None), NOTHING), None, -1, 1),
        (((3, 3), (3, 3), (3, 3)), None, -1, 2),
        # One that says it has computed, and gave the client nothing to carry; and one that was given it.
        (((3, 3), NOTHING, NOTHING), {0: -1}, -1, 0),
        (((3, 3), NOTHING, NOTHING), {0: 3}, -1, 1),
        # Rebuilding from what the second has kept: it sends nothing; or the third does not compute.
        ((NOTHING, NOTHING, NOTHING), None, 1, 1),
        ((NOTHING, NOTHING, (2, None)), None, 1, 2),
        ((NOTHING, NOTHING, NOTHING), None, 0, 0),
    ],
)
def test_who_is_behind(states: Any, handed_on: dict[int, int] | None, source: int, slow: int) -> None:
    assert find_slow(hops(handed_on), progress(*states), source) == slow


@pytest.mark.parametrize(
    ("told", "is_credible"),
    [
        (Progress(attempt=1, received=3, computed=2), True),
        (Progress(attempt=1), True),
        (Progress(attempt=2, received=3, computed=2), False),  # as if its server before had begun another attempt
        (Progress(attempt=1, received=4, computed=2), False),  # or had sent it a step that is not there
        (Progress(attempt=1, received=3, computed=1 << 53), False),
        (None, False),
    ],
)
def test_what_is_believed_of_progress(told: Progress | None, is_credible: bool) -> None:
    expected = told if is_credible else Progress(attempt=1)
    assert credible(told, attempt=1, end=4) == expected
