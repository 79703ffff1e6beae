"""Packed hidden states as they travel: cut, put together and chosen by rows, without a loss.

Letters: N tokens of all rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petals_core.errors import ProtocolError
from petals_core.tensors.codec import TensorSpec, decode, encode
from petals_core.wire.messages import Buffer, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Hidden states [N, H] and the buffers that, one after another, are their bytes."""

    spec: TensorSpec
    payload: Sequence[Buffer]


def read_states(
    message: Message, tensors: Sequence[object], expected: TensorSpec, num_tokens: int | None = None
) -> States:
    """Check that a reply holds states of the shape and dtype that went in; of ``num_tokens`` tokens if that is given.

    Raises:
        ProtocolError: it does not.
    """
    if len(tensors) != 1:
        raise ProtocolError(f"the server answered with {len(tensors)} tensors instead of one")
    shape = expected.shape if num_tokens is None else (num_tokens, *expected.shape[1:])
    is_same = shape == expected.shape and tensors[0] == expected.as_received()
    spec = expected if is_same else TensorSpec.from_wire(tensors[0])
    if spec.shape != shape or spec.dtype != expected.dtype:
        raise ProtocolError(
            f"the server answered with {spec.dtype}{list(spec.shape)} instead of {expected.dtype}{list(shape)}"
        )
    payload = message.received_payload
    if payload.nbytes != spec.num_bytes:
        raise ProtocolError(f"the server announced {spec.num_bytes} bytes and sent {payload.nbytes}")
    return States(spec=spec, payload=(payload,))


def join_states(parts: list[tuple[tuple[int, ...], States]]) -> States:
    """Make one packed batch of several of the same rows, given as (row_tokens, states): row by row, in order."""
    pieces = [_rows(row_tokens, states) for row_tokens, states in parts]
    return _packed([piece for row in zip(*pieces, strict=True) for piece in row])


def select_rows(row_tokens: Sequence[int], states: States, rows: Sequence[int]) -> States:
    """The packed batch of some rows, in the order in which they are given; a row may be taken more than once."""
    pieces = _rows(row_tokens, states)
    return _packed([pieces[row] for row in rows])


def select_last(row_tokens: Sequence[int], states: States, counts: Sequence[int]) -> States:
    """The packed batch of the last ``counts`` tokens of each row."""
    pieces = zip(_rows(row_tokens, states), row_tokens, counts, strict=True)
    return _packed([piece[num_tokens - count :] for piece, num_tokens, count in pieces])


def _rows(row_tokens: Sequence[int], states: States) -> tuple[torch.Tensor, ...]:
    return decode(states.spec, b"".join(states.payload)).split(list(row_tokens))


def _packed(pieces: Sequence[torch.Tensor]) -> States:
    spec, payload = encode(torch.cat(list(pieces)))
    return States(spec=spec, payload=payload)
