"""The columns of a session's attention cache, and how a step's packed tokens spread over them.

Letters: R rows, T tokens of all rows together, N columns that a step appends (its longest row's tokens), C columns in
all. Each row's new tokens stand at the right end of the N columns; what lies left of them in its row is a pad.
"""

# ruff: noqa: N803 -- tensors are named by their shape

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

PositionRuns = tuple[tuple[tuple[int, int], ...], ...]


class ColumnLedger:
    """Which columns of a session's cache hold a token of which row."""

    def __init__(self, num_rows: int) -> None:
        self.num_columns = 0
        self.row_lengths = [0] * num_rows
        """Tokens of each row, pads not counted."""
        self._valid_RC: NDArray[np.bool_] | None = None
        """None while there is no pad at all, which is the rule and costs nothing."""

    @property
    def num_rows(self) -> int:
        return len(self.row_lengths)

    @property
    def has_pads(self) -> bool:
        return self._valid_RC is not None

    def crop(self, num_columns: int) -> None:
        """Forget all columns but the first ``num_columns``."""
        assert 0 <= num_columns <= self.num_columns
        if num_columns == self.num_columns:
            return
        self.num_columns = num_columns
        if self._valid_RC is None:
            self.row_lengths = [num_columns] * self.num_rows
        else:
            self._adopt(self._valid_RC[:, :num_columns])

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i be what row ``order[i]`` was."""
        assert len(order) == self.num_rows
        self.row_lengths = [self.row_lengths[row] for row in order]
        if self._valid_RC is not None:
            self._adopt(self._valid_RC[list(order)])

    def append(self, row_tokens: Sequence[int]) -> None:
        """Append the columns of a step."""
        assert len(row_tokens) == self.num_rows
        num_new = max(row_tokens)
        if self._valid_RC is not None or min(row_tokens) < num_new:
            self._valid_RC = np.concatenate([self.valid(), spread(row_tokens)], axis=1)
        self.num_columns += num_new
        self.row_lengths = [length + count for length, count in zip(self.row_lengths, row_tokens, strict=True)]

    def count_within(self, num_columns: int) -> list[int]:
        """Tokens of each row in the first ``num_columns`` columns."""
        if self._valid_RC is None:
            return [num_columns] * self.num_rows
        counts: list[int] = self._valid_RC[:, :num_columns].sum(axis=1).tolist()
        return counts

    def valid(self) -> NDArray[np.bool_]:
        """Which of the columns hold a token: bool [R, C]."""
        if self._valid_RC is None:
            return np.ones((self.num_rows, self.num_columns), dtype=np.bool_)
        return self._valid_RC

    def _adopt(self, valid_RC: NDArray[np.bool_]) -> None:
        self._valid_RC = None if valid_RC.all() else valid_RC.copy()
        self.row_lengths = valid_RC.sum(axis=1).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A part of a request that is computed in one go: from each row, ``row_tokens`` tokens from ``row_starts`` on.

    ``row_starts`` are indices into the packed tokens of the whole request.
    """

    row_tokens: tuple[int, ...]
    row_starts: tuple[int, ...]

    @property
    def num_columns(self) -> int:
        return max(self.row_tokens)

    @property
    def is_rectangular(self) -> bool:
        """Whether no row has a pad."""
        return min(self.row_tokens) == max(self.row_tokens)


def split_columns(row_tokens: Sequence[int], max_tokens: int, *, is_whole: bool = False) -> list[Chunk]:
    """Cut a step into chunks of at most ``max_tokens`` tokens, pads included (at least one column each), left to right.

    Computed one after another with a cache they amount to the step computed at once. Where ``is_whole``, each row of a
    chunk has a token in all of its columns or in none.
    """
    num_columns = max(row_tokens)
    width = max(1, max_tokens // len(row_tokens))
    offsets = _offsets(row_tokens)
    if 0 < num_columns <= width and not is_whole:
        return [Chunk(row_tokens=tuple(row_tokens), row_starts=tuple(offsets))]
    edges = sorted(
        {num_columns - count for count in row_tokens if count} | {num_columns} if is_whole else {0, num_columns}
    )
    chunks = []
    for left, right in _pieces(edges, width):
        counts, starts = [], []
        for count, offset in zip(row_tokens, offsets, strict=True):
            pads = num_columns - count
            counts.append(max(0, right - max(left, pads)))
            starts.append(offset + max(0, left - pads))
        chunks.append(Chunk(row_tokens=tuple(counts), row_starts=tuple(starts)))
    return chunks


def _pieces(edges: Sequence[int], width: int) -> Iterator[tuple[int, int]]:
    for first, last in pairwise(edges):
        for left in range(first, last, width):
            yield left, min(left + width, last)


def take_rows(
    row_tokens: Sequence[int], first: int, max_tokens: int, *, is_whole: bool = False
) -> tuple[Chunk, int] | None:
    """The next chunk of a request without a cache: whole, neighbouring rows, and the row behind them.

    Rows before ``first`` are done; None: there are no others. A chunk has at most ``max_tokens`` tokens, pads included,
    unless a single row has more. Rows without tokens are left out. Where ``is_whole``, the rows of a chunk are equally
    long.
    """
    while first < len(row_tokens) and row_tokens[first] == 0:
        first += 1
    if first == len(row_tokens):
        return None
    end = first + 1
    longest = row_tokens[first]
    while end < len(row_tokens) and row_tokens[end] > 0:
        if is_whole and row_tokens[end] != longest:
            break
        longest = max(longest, row_tokens[end])
        if longest * (end + 1 - first) > max_tokens:
            break
        end += 1
    starts = _offsets(row_tokens)[first:end]
    return Chunk(row_tokens=tuple(row_tokens[first:end]), row_starts=tuple(starts)), end


def spread(row_tokens: Sequence[int]) -> NDArray[np.bool_]:
    """Where the tokens of a batch stand in its padded form: bool [R, N]."""
    num_columns = max(row_tokens)
    pads = np.array([num_columns - count for count in row_tokens])
    return np.arange(num_columns) >= pads[:, None]


def expand_positions(runs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The position ids that (first, count) runs stand for."""
    return np.concatenate([np.arange(first, first + count) for first, count in runs] or [np.empty(0, np.int64)])


def _offsets(row_tokens: Sequence[int]) -> list[int]:
    offsets = [0]
    for count in row_tokens:
        offsets.append(offsets[-1] + count)
    return offsets[:-1]
