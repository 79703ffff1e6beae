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


@given(pairs)
def test_the_first_delay_to_a_peer_is_found(given_pairs: list[tuple[bytes, float]]) -> None:
    delays = NextDelays.of(given_pairs)
    for digest, delay_s in dict(reversed(given_pairs)).items():
        assert delays.get(digest) == delay_s


def test_a_digest_across_two_records_is_not_found() -> None:
    delays = NextDelays.of([(bytes(range(32)), 0.0), (bytes(range(32, 64)), 1.0), (b"\x07" * 32, 2.0)])
    assert delays.get(delays.packed[20:52]) is None
    hidden = NextDelays.of([*delays, (delays.packed[20:52], 3.0)])
    assert hidden.get(delays.packed[20:52]) == 3.0


def test_none() -> None:
    assert NextDelays().get(bytes(32)) is None
    assert list(NextDelays()) == []
    assert NextDelays() == NextDelays.of([])


def test_what_is_no_delay_is_refused() -> None:
    with pytest.raises(struct.error):
        NextDelays.of([(bytes(32), "soon")])  # type: ignore[list-item]
