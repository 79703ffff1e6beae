"""Packed hidden states as messages carry them, whole or in parts.

Letters: N tokens of all rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from petals_client.chain import StepRequest
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


def join_parts(hidden: Tensor, parts: Sequence[tuple[StepRequest, Part]], results: Sequence[States]) -> Tensor:
    """Put what came back for each part that wants something where it belongs in the whole; all else is zero."""
    wanting = [(request, part) for request, part in parts if request.wanted != 0]
    if len(results) == 1 and results[0].spec.shape[0] == hidden.shape[0]:
        return decode_states(results[0])
    output = torch.zeros_like(hidden)
    for (request, part), states in zip(wanting, results, strict=True):
        tokens = decode_states(states)
        offset = 0
        for (first, count), num_wanted in zip(part.ranges, request.result_tokens, strict=True):
            end = first + count
            output[end - num_wanted : end] = tokens[offset : offset + num_wanted]
            offset += num_wanted
    return output
