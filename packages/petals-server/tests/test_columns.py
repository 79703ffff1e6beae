from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_server.columns import Chunk, ColumnLedger, expand_positions, split_columns, spread, take_rows

ROW_TOKENS = st.lists(st.integers(0, 12), min_size=1, max_size=5)


def test_a_ledger_without_pads_keeps_no_mask() -> None:
    ledger = ColumnLedger(2)
    ledger.append([3, 3])
    ledger.append([1, 1])
    assert (ledger.num_columns, ledger.row_lengths, ledger.has_pads) == (4, [4, 4], False)
    ledger.crop(2)
    assert (ledger.num_columns, ledger.row_lengths, ledger.has_pads) == (2, [2, 2], False)
    assert ledger.valid().all()


def test_pads_stand_left_of_a_steps_tokens() -> None:
    ledger = ColumnLedger(2)
    ledger.append([3, 1])
    ledger.append([1, 1])
    ledger.append([0, 2])
    assert ledger.row_lengths == [4, 4]
    assert ledger.valid().astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]


def test_rows_are_reordered_and_repeated() -> None:
    ledger = ColumnLedger(3)
    ledger.append([1, 2, 3])
    ledger.reorder([2, 2, 0])
    assert ledger.row_lengths == [3, 3, 1]
    assert ledger.valid().astype(int).tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 1]]


def test_cutting_the_pads_away_makes_the_mask_unnecessary_again() -> None:
    ledger = ColumnLedger(2)
    ledger.append([2, 2])
    ledger.append([1, 0])
    ledger.crop(2)
    assert not ledger.has_pads
    ledger.append([0, 2])
    ledger.reorder([1, 1])
    assert not ledger.has_pads


@given(ROW_TOKENS, st.integers(1, 20))
def test_chunks_of_a_step_amount_to_the_step(row_tokens: list[int], max_tokens: int) -> None:
    whole, parts = ColumnLedger(len(row_tokens)), ColumnLedger(len(row_tokens))
    whole.append(row_tokens)
    taken: list[list[int]] = [[] for _ in row_tokens]
    for chunk in split_columns(row_tokens, max_tokens):
        parts.append(chunk.row_tokens)
        assert chunk.num_columns * len(row_tokens) <= max_tokens or chunk.num_columns == 1
        for row, (start, count) in enumerate(zip(chunk.row_starts, chunk.row_tokens, strict=True)):
            taken[row] += range(start, start + count)
    assert np.array_equal(whole.valid(), parts.valid())
    assert whole.row_lengths == parts.row_lengths == row_tokens
    assert [token for row in taken for token in row] == list(range(sum(row_tokens)))
    assert [len(row) for row in taken] == row_tokens


def rows_in_chunks(row_tokens: list[int], max_tokens: int, *, is_whole: bool = False) -> Iterator[Chunk]:
    first = 0
    while (taken := take_rows(row_tokens, first, max_tokens, is_whole=is_whole)) is not None:
        chunk, first = taken
        yield chunk


@given(ROW_TOKENS, st.integers(1, 20))
def test_chunks_of_rows_hold_every_token_once(row_tokens: list[int], max_tokens: int) -> None:
    taken: list[int] = []
    for chunk in rows_in_chunks(row_tokens, max_tokens):
        assert len(chunk.row_tokens) * chunk.num_columns <= max_tokens or len(chunk.row_tokens) == 1
        assert min(chunk.row_tokens) > 0
        for start, count in zip(chunk.row_starts, chunk.row_tokens, strict=True):
            taken += range(start, start + count)
    assert taken == list(range(sum(row_tokens)))


def test_spread_and_positions() -> None:
    assert spread([2, 0, 1]).astype(int).tolist() == [[1, 1], [0, 0], [0, 1]]
    assert expand_positions(((5, 2), (0, 3))).tolist() == [5, 6, 0, 1, 2]
    assert expand_positions(()).tolist() == []


def test_cropping_beyond_the_columns_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        ColumnLedger(1).crop(1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 30))
def test_whole_chunks_have_rows_that_are_full_or_empty(row_tokens: list[int], max_tokens: int) -> None:
    chunks = split_columns(row_tokens, max_tokens, is_whole=True)
    for chunk in chunks:
        assert set(chunk.row_tokens) <= {0, chunk.num_columns}
        assert chunk.num_columns * len(row_tokens) <= max_tokens or chunk.num_columns == 1
    assert [sum(counts) for counts in zip(*(chunk.row_tokens for chunk in chunks), strict=True)] == (
        row_tokens if chunks else []
    )
    for chunk in rows_in_chunks(row_tokens, max_tokens, is_whole=True):
        assert chunk.is_rectangular
