"""The columns of a session as its user counts them, and as the servers count them.

A user's columns include pads; the servers' do not know them: a step there appends as many columns as its longest row
has tokens, and each row's tokens stand at their right end. Both counts are kept here, so that forgetting the last
columns of one becomes a number of columns of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from petals_core.errors import InvalidRequestError

RowMasks = tuple[int, ...]
"""Per row the columns that hold a token, as a bit set: bit 0 is the leftmost column."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """Neighbouring columns that were appended together; segments without pads merge."""

    width: int
    masks: RowMasks | None
    """None: every row has a token in every column, here and on the servers."""
    server_width: int
    """Columns on the servers: as many as the longest row had tokens. Each row's tokens stand at their right end."""

    @classmethod
    def of(cls, width: int, masks: RowMasks | None, server_width: int) -> Self:
        """Make a segment whose ``masks`` are None if that says it all."""
        if masks is not None and server_width == width and _are_full(masks, width):
            masks = None
        return cls(width, masks, server_width)

    def count(self, row: int) -> int:
        return self.width if self.masks is None else self.masks[row].bit_count()


class ColumnMap:
    """Columns of one session of ``num_rows`` rows."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.length = 0
        """Columns as the user counts them."""
        self.server_length = 0
        """Columns as the servers count them."""
        self.row_lengths = [0] * num_rows
        """Tokens of each row, pads not counted."""
        self._segments: list[_Segment] = []

    def append(self, width: int, masks: RowMasks | None = None) -> None:
        """Append ``width`` columns; ``masks`` says which hold tokens, None that all do."""
        if width == 0:
            return
        if masks is not None:
            segment = _Segment.of(width, masks, max(mask.bit_count() for mask in masks))
            masks = segment.masks
        if masks is not None:
            self._segments.append(segment)
            self.length += width
            self.server_length += segment.server_width
            self.row_lengths = [length + mask.bit_count() for length, mask in zip(self.row_lengths, masks, strict=True)]
            return
        self.length += width
        self.server_length += width
        self.row_lengths = [length + width for length in self.row_lengths]
        if self._segments and self._segments[-1].masks is None:
            width += self._segments.pop().width
        self._segments.append(_Segment(width, None, width))

    def truncate(self, length: int) -> None:
        """Forget all columns but the first ``length``.

        Raises:
            InvalidRequestError: pads on the right make the cut something that the servers can't do; nothing changed.
        """
        assert 0 <= length <= self.length
        segments = list(self._segments)
        excess = self.length - length
        while segments and excess >= segments[-1].width:
            excess -= segments.pop().width
        if excess:
            segments.append(_cut(segments.pop(), excess))
        self._segments = segments
        self.length = length
        self.server_length = sum(segment.server_width for segment in segments)
        self.row_lengths = [sum(segment.count(row) for segment in segments) for row in range(self.num_rows)]

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i be what row ``order[i]`` was."""
        assert len(order) == self.num_rows
        self.row_lengths = [self.row_lengths[row] for row in order]
        self._segments = [
            segment
            if segment.masks is None
            else _Segment.of(segment.width, tuple(segment.masks[row] for row in order), segment.server_width)
            for segment in self._segments
        ]

    def masks(self) -> RowMasks | None:
        """Which columns hold a token, over the whole length; None: all do."""
        if all(segment.masks is None for segment in self._segments):
            return None
        rows = [0] * self.num_rows
        offset = 0
        for segment in self._segments:
            full = (1 << segment.width) - 1
            for row in range(self.num_rows):
                rows[row] |= (full if segment.masks is None else segment.masks[row]) << offset
            offset += segment.width
        masks = tuple(rows)
        return None if _are_full(masks, self.length) else masks


def _are_full(masks: RowMasks, width: int) -> bool:
    full = (1 << width) - 1
    return all(mask == full for mask in masks)


def _cut(segment: _Segment, excess: int) -> _Segment:
    """Drop the last ``excess`` columns of a segment."""
    width = segment.width - excess
    if segment.masks is None:
        return _Segment(width, None, width)
    masks = tuple(mask & ((1 << width) - 1) for mask in segment.masks)
    # Cutting on the servers takes the same number of columns from the right end of all rows, so it keeps what is wanted
    # only if each row loses equally many tokens, or all it has.
    lost = max(before.bit_count() - after.bit_count() for before, after in zip(segment.masks, masks, strict=True))
    for before, after in zip(segment.masks, masks, strict=True):
        if after.bit_count() != max(0, before.bit_count() - lost):
            raise InvalidRequestError(
                "a session can't be cut in the middle of a step whose rows have pads on the right; "
                "cut it before or behind that step, or pad on the left"
            )
    return _Segment.of(width, masks, segment.server_width - lost)
