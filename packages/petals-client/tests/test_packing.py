"""Pads never travel, and everything comes back to its place."""

from __future__ import annotations

import pytest
import torch

from petals_client.packing import pack, read_layout, read_position_runs, unpack
from petals_core.errors import InvalidRequestError


def test_without_pads_nothing_is_copied() -> None:
    hidden = torch.randn(2, 3, 4)
    for valid in (None, torch.ones(2, 3)):
        layout = read_layout(2, 3, valid)
        assert layout.row_tokens == (3, 3)
        assert layout.masks is None
        packed = pack(hidden, layout)
        assert packed.data_ptr() == hidden.data_ptr()
        assert unpack(packed, layout).data_ptr() == hidden.data_ptr()


def test_pads_are_left_out_and_come_back_as_zeros() -> None:
    hidden = torch.randn(3, 4, 2)
    valid = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    layout = read_layout(3, 4, valid)
    assert layout.row_tokens == (2, 4, 0)
    assert layout.masks == (0b0110, 0b1111, 0)
    assert layout.num_tokens == 6
    packed = pack(hidden, layout)
    assert torch.equal(packed, torch.cat([hidden[0, 1:3], hidden[1]]))
    assert torch.equal(unpack(packed, layout), hidden * valid[..., None])


def test_wide_masks() -> None:
    valid = torch.zeros(1, 100)
    valid[0, 99] = valid[0, 8] = 1
    assert read_layout(1, 100, valid).masks == ((1 << 99) | (1 << 8),)


def test_positions_that_go_on_are_not_told() -> None:
    layout = read_layout(2, 3, None)
    assert read_position_runs(torch.tensor([[4, 5, 6]]), layout, [4, 4]) is None
    assert read_position_runs(torch.tensor([[4, 5, 6], [1, 2, 3]]), layout, [4, 1]) is None
    padded = read_layout(2, 3, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert read_position_runs(torch.tensor([[9, 0, 1], [0, 1, 2]]), padded, [0, 0]) is None


def test_other_positions_are_told_as_runs() -> None:
    layout = read_layout(2, 4, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 7, 8]])
    assert read_position_runs(positions, layout, [0, 0]) == (((1, 3),), ((0, 2), (7, 2)))
    assert read_position_runs(torch.tensor([[5, 5]]), read_layout(1, 2, None), [0]) == (((5, 1), (5, 1)),)
    empty = read_layout(2, 1, torch.tensor([[0], [1]]))
    assert read_position_runs(torch.tensor([[0], [3]]), empty, [0, 0]) == ((), ((3, 1),))


def test_positions_that_can_not_be_told() -> None:
    with pytest.raises(InvalidRequestError, match="must not be negative"):
        read_position_runs(torch.tensor([[-1, 0]]), read_layout(1, 2, None), [0])
    with pytest.raises(InvalidRequestError, match="jump more than 1024 times"):
        read_position_runs(torch.arange(0, 4000, 2)[None], read_layout(1, 2000, None), [0])
