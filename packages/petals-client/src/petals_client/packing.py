"""Padded batches <-> packed rows: pads never travel.

Letters: R rows, T tokens per row with pads, N tokens of all rows without pads, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from petals_client.columns import RowMasks
from petals_core.errors import InvalidRequestError
from petals_core.steps import PositionRuns as PositionRuns

_MAX_RUNS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the tokens of a padded batch [R, T] stand."""

    num_rows: int
    width: int
    """T"""
    row_tokens: tuple[int, ...]
    masks: RowMasks | None
    """Bit sets of the columns with tokens, one per row; None: there are no pads."""
    indices: Tensor | None
    """Flat positions (row * T + column) of the tokens, int64 on the CPU; None: there are no pads."""

    @property
    def num_tokens(self) -> int:
        return sum(self.row_tokens)


def read_layout(num_rows: int, width: int, valid: Tensor | None) -> Layout:
    """Describe a batch whose tokens are where ``valid`` (bool or integer [R, T]) is not zero; None: everywhere."""
    if valid is not None:
        is_token = valid.detach().to("cpu").numpy() != 0
        if not is_token.all():
            return Layout(
                num_rows=num_rows,
                width=width,
                row_tokens=tuple(is_token.sum(axis=1).tolist()),
                masks=tuple(
                    int.from_bytes(row.tobytes(), "little") for row in np.packbits(is_token, axis=1, bitorder="little")
                ),
                indices=torch.from_numpy(np.flatnonzero(is_token)),
            )
    return _full_layout(num_rows, width)


@functools.lru_cache(maxsize=64)
def _full_layout(num_rows: int, width: int) -> Layout:
    """That of a batch without pads."""
    return Layout(num_rows=num_rows, width=width, row_tokens=(width,) * num_rows, masks=None, indices=None)


def pack(hidden: Tensor, layout: Layout) -> Tensor:
    """Return the tokens' states [N, H]: a view of ``hidden`` where there are no pads."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat if layout.indices is None else flat.index_select(0, layout.indices.to(flat.device))


def unpack(packed: Tensor, layout: Layout) -> Tensor:
    """Return [R, T, H] with zeros at the pads: a view where there are none."""
    size = packed.shape[-1]
    if layout.indices is None:
        return packed.view(layout.num_rows, layout.width, size)
    padded = packed.new_zeros(layout.num_rows * layout.width, size)
    padded.index_copy_(0, layout.indices.to(padded.device), packed)
    return padded.view(layout.num_rows, layout.width, size)


def read_position_runs(position_ids: Tensor, layout: Layout, row_lengths: Sequence[int]) -> PositionRuns | None:
    """Return the positions of the tokens as runs; None where each row goes on from its ``row_lengths`` tokens.

    ``position_ids`` is integer [R, T] or [1, T]; what stands at pads does not matter.

    Raises:
        InvalidRequestError: the positions jump more often than a message can say, or are negative.
    """
    if layout.width == 1 and layout.masks is None:
        # One token of each row, as in decoding: quicker without NumPy.
        first = position_ids.flatten().tolist()
        if (first * layout.num_rows if len(first) == 1 else first) == list(row_lengths):
            return None
    positions = position_ids.detach().to("cpu").numpy()
    positions = np.broadcast_to(positions, (layout.num_rows, layout.width))
    if layout.masks is None:
        starts = np.asarray(row_lengths)[:, None]
        if np.array_equal(positions, starts + np.arange(layout.width)):
            return None
        rows = list(positions)
    else:
        assert layout.indices is not None
        tokens = positions.reshape(-1)[layout.indices.numpy()]
        rows = np.split(tokens, np.cumsum(layout.row_tokens)[:-1])
        if all(
            np.array_equal(row, length + np.arange(len(row))) for row, length in zip(rows, row_lengths, strict=True)
        ):
            return None
    return tuple(_runs(row) for row in rows)


def _runs(row: np.ndarray) -> tuple[tuple[int, int], ...]:
    if len(row) == 0:
        return ()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(row) != 1) + 1])
    if len(starts) > _MAX_RUNS:
        raise InvalidRequestError(f"the position ids of a row jump more than {_MAX_RUNS} times: use consecutive ones")
    if row.min() < 0:
        raise InvalidRequestError("position ids must not be negative")
    counts = np.diff([*starts, len(row)])
    return tuple((int(row[start]), int(count)) for start, count in zip(starts, counts, strict=True))
