"""Delays to others, packed for planning."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.next_delays import NextDelays

pairs = st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.floats(0, 60)), max_size=8)


@given(pairs)
def test_what_was_packed_is_read_back(given_pairs: list[tuple[bytes, float]]) -> None:
    delays = NextDelays.of(given_pairs)
    assert list(delays) == given_pairs
    assert len(delays) == len(given_pairs)
    assert bool(delays) == bool(given_pairs)
    assert delays == NextDelays.of(given_pairs)


def test_none() -> None:
    assert list(NextDelays()) == []
    assert NextDelays() == NextDelays.of([])


def test_what_is_no_delay_is_refused() -> None:
    with pytest.raises(struct.error):
        NextDelays.of([(bytes(32), "soon")])  # type: ignore[list-item]
