"""Packed states are put together and chosen by rows, bit by bit."""

from __future__ import annotations

import pytest
import torch

from petals_core.errors import ProtocolError
from petals_core.tensors.codec import decode, encode
from petals_core.tensors.states import States, join_states, read_states, select_last, select_rows
from petals_core.wire.messages import Message, Pushed


def states(tensor: torch.Tensor) -> States:
    spec, payload = encode(tensor)
    return States(spec=spec, payload=payload)


def tensor(each: States) -> torch.Tensor:
    return decode(each.spec, b"".join(each.payload))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joining_and_choosing(dtype: torch.dtype) -> None:
    first, second = torch.randn(3, 4).to(dtype), torch.randn(2, 4).to(dtype)
    joined = join_states([((1, 2), states(first)), ((1, 1), states(second))])
    assert torch.equal(tensor(joined), torch.stack([first[0], second[0], first[1], first[2], second[1]]))
    chosen = select_rows((2, 3), joined, (1, 1, 0))
    assert torch.equal(tensor(chosen), tensor(joined)[[2, 3, 4, 2, 3, 4, 0, 1]])
    assert torch.equal(tensor(select_last((2, 3), joined, (1, 2))), tensor(joined)[[1, 3, 4]])


def test_replies_are_checked() -> None:
    spec, payload = encode(torch.zeros(2, 4))
    content = bytes(payload[0])
    assert read_states(Message(Pushed(), (content,)), (spec.to_wire(),), spec).spec == spec
    other, _ = encode(torch.zeros(3, 4))
    for tensors, received in (((), content), ((other.to_wire(),), content), ((spec.to_wire(),), content[:-1])):
        with pytest.raises(ProtocolError):
            read_states(Message(Pushed(), (received,)), tensors, spec)
