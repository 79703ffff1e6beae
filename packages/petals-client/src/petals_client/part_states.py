"""Packed hidden states as messages carry them, whole or in parts.

Letters: N tokens of all rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from petals_client.chunks import Part
from petals_client.options import ClientOptions
from petals_core.tensors.codec import Encoding, decode, encode
from petals_core.tensors.states import States
from petals_core.wire.compression import quantized_arrives_first


def encode_states(hidden: Tensor, options: ClientOptions, bytes_per_s: float | None = None) -> States:
    """Describe hidden states [N, H], as they are without a copy if they are contiguous. Servers answer in kind.

    ``int8`` is not used on a link that is known to be so fast that they arrive earlier as they are, except with a fixed
    ``compression``.
    """
    encoding = options.activation_codec
    if encoding == Encoding.INT8 and options.compression == "auto":
        is_worth_it = quantized_arrives_first(hidden.numel(), hidden.element_size(), bytes_per_s)
        encoding = encoding if is_worth_it else None
    spec, payload = encode(hidden, encoding=None if encoding is None else Encoding(encoding))
    return States(spec=spec, payload=payload)


def decode_states(states: States) -> Tensor:
    """Return hidden states [N, H] that lie in the received bytes."""
    (payload,) = states.payload
    return decode(states.spec, memoryview(payload))


def take_part(hidden: Tensor, part: Part) -> Tensor:
    """The packed tokens of a part."""
    pieces = [hidden[first : first + count] for first, count in part.ranges if count]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def join_parts(hidden: Tensor, parts: Sequence[Part], results: Sequence[States]) -> Tensor:
    """Put what came back for each part, or for the last ones, where it belongs in the whole; all else is zero."""
    if len(parts) == 1 and parts[0].ranges and sum(count for _, count in parts[0].ranges) == hidden.shape[0]:
        return decode_states(results[0])
    num_silent = len(parts) - len(results)
    output = torch.zeros_like(hidden) if num_silent else torch.empty_like(hidden)
    for part, states in zip(parts[num_silent:], results, strict=True):
        tokens = decode_states(states)
        offset = 0
        for first, count in part.ranges:
            output[first : first + count] = tokens[offset : offset + count]
            offset += count
    return output
