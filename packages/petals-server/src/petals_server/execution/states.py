"""Hidden states between the wire and the device.

Letters: R rows, T tokens of all rows together, N columns of a batch, C columns of a cache, H hidden size.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from petals_core.tensors.codec import Encoding, TensorSpec, decode, encode
from petals_server.columns import PositionRuns, expand_positions

_LIGHT_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStates:
    """Hidden states [T, H] as they came from a client, checked but not yet decoded."""

    spec: TensorSpec
    payload: memoryview
    row_tokens: tuple[int, ...]
    position_runs: PositionRuns | None

    @property
    def is_heavy(self) -> bool:
        """Whether decoding and encoding takes more than moving some bytes."""
        spec = self.spec
        return spec.compression != "none" or spec.encoding != spec.dtype or spec.num_bytes > _LIGHT_BYTES

    def decode(self) -> torch.Tensor:
        """On the CPU, in its own dtype; raises ``ProtocolError``."""
        return decode(self.spec, self.payload)

    def positions(self) -> NDArray[np.int64] | None:
        """The client's position id of each token [T]; None if it gave none."""
        if self.position_runs is None:
            return None
        return np.concatenate([expand_positions(runs) for runs in self.position_runs])

    def encode(self, output_TH: torch.Tensor) -> EncodedStates:
        """An answer in the dtype and encoding of the request; the connection compresses it where that pays."""
        asked = self.spec
        if output_TH.dtype != (dtype := getattr(torch, asked.dtype)):
            output_TH = output_TH.to(dtype)
        spec, buffers = encode(output_TH, encoding=None if asked.encoding == asked.dtype else Encoding(asked.encoding))
        return EncodedStates(spec=spec, buffers=buffers)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedStates:
    """Hidden states [T, H] as they go back: logical dtype and encoding are those of the request."""

    spec: TensorSpec
    buffers: Sequence[memoryview]


def default_positions(row_tokens: Sequence[int], row_lengths: Sequence[int]) -> torch.Tensor:
    """Position ids [R, N] of tokens behind ``row_lengths`` cached ones; those of pads are 0."""
    num_columns = max(row_tokens)
    positions_RN = np.zeros((len(row_tokens), num_columns), dtype=np.int64)
    for row, (length, count) in enumerate(zip(row_lengths, row_tokens, strict=True)):
        positions_RN[row, num_columns - count :] = np.arange(length, length + count)
    return torch.from_numpy(positions_RN)


def as_mask(valid_RC: NDArray[np.bool_], device: torch.device) -> torch.Tensor:
    """A 2D attention mask as a span takes it, int64 [R, C]."""
    return torch.from_numpy(valid_RC).to(device=device, dtype=torch.int64)
