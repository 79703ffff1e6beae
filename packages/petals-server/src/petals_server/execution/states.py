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

from petals_core.steps import join_row_tokens
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

    def encode(self, output_TH: torch.Tensor) -> tuple[EncodedStates]:
        """An answer in the dtype and encoding of the request; the connection compresses it where that pays."""
        asked = self.spec
        if output_TH.dtype != (dtype := getattr(torch, asked.dtype)):
            output_TH = output_TH.to(dtype)
        spec, buffers = encode(output_TH, encoding=None if asked.encoding == asked.dtype else Encoding(asked.encoding))
        return (EncodedStates(spec=spec, buffers=buffers),)


@dataclass(frozen=True, slots=True)
class JoinedStates:
    """Hidden states [T, H] of several steps, of which each continues the one before it (``petals_core.steps``), as
    those of one step."""

    parts: tuple[PackedStates, ...]

    @property
    def row_tokens(self) -> tuple[int, ...]:
        return join_row_tokens(part.row_tokens for part in self.parts)

    @property
    def position_runs(self) -> None:
        """None: positions go on from step to step."""

    @property
    def is_heavy(self) -> bool:
        """See ``PackedStates``."""
        return (
            any(part.is_heavy for part in self.parts) or sum(part.spec.num_bytes for part in self.parts) > _LIGHT_BYTES
        )

    def decode(self) -> torch.Tensor:
        """See ``PackedStates.decode``."""
        by_step = [part.decode().split(part.row_tokens) for part in self.parts]
        return torch.cat([states_NH for row in zip(*by_step, strict=True) for states_NH in row])

    def positions(self) -> None:
        """None, see ``position_runs``."""

    def encode(self, output_TH: torch.Tensor) -> tuple[EncodedStates, ...]:
        """The answer to each step, see ``PackedStates.encode``."""
        counts = zip(*(part.row_tokens for part in self.parts), strict=True)
        by_row = [row_NH.split(steps) for row_NH, steps in zip(output_TH.split(self.row_tokens), counts, strict=True)]
        by_step = zip(*by_row, strict=True)
        return tuple(
            encoded
            for part, rows in zip(self.parts, by_step, strict=True)
            for encoded in part.encode(rows[0] if len(rows) == 1 else torch.cat(rows))
        )


InputStates = PackedStates | JoinedStates


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
