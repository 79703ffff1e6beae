"""Low-rank adapters in memory: what they add to the outputs of a block's linear layers.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al. 2021), section 4.1: a layer's output ``W x``
gets ``scaling * B A x`` added, where A is [rank, in] and B is [out, rank].

Letters: N tokens, I inputs of a layer, O outputs, K rank, V values of all matrices in one row.
"""

# ruff: noqa: N803, N815 -- tensors are named by their shape

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from petals_core.errors import InvalidRequestError

LayerShapes = Mapping[str, tuple[int, int]]
"""A block's linear layers: path in the block -> numbers of inputs and of outputs."""


def linear_layers(block: nn.Module) -> LayerShapes:
    """The linear layers of a block, whatever form their weights have."""
    from transformers.pytorch_utils import Conv1D

    shapes: dict[str, tuple[int, int]] = {}
    for path, module in block.named_modules():
        if isinstance(module, Conv1D):
            shapes[path] = (module.nx, module.nf)
        elif not any(module.children()):
            inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
            if isinstance(inputs, int) and isinstance(outputs, int):
                shapes[path] = (inputs, outputs)
    return shapes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """The two matrices that change one layer."""

    down_KI: Tensor
    up_OK: Tensor
    scaling: float

    def product(self, inputs: Tensor) -> Tensor:
        """What is added for ``inputs`` [..., I]: [..., O], in the matrices' dtype."""
        inputs = inputs.to(self.down_KI.dtype)
        return nn.functional.linear(nn.functional.linear(inputs, self.down_KI), self.up_OK) * self.scaling


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """Changes to blocks of a model; never changes itself."""

    blocks: Mapping[int, Mapping[str, LowRank]]
    """By a block's number in the model, and by the path of a layer in it."""

    @property
    def tensors(self) -> Iterable[Tensor]:
        """All matrices."""
        for layers in self.blocks.values():
            for matrices in layers.values():
                yield from (matrices.down_KI, matrices.up_OK)

    @cached_property
    def num_bytes(self) -> int:
        """Memory of the matrices."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class LoraLayout:
    """How the matrices of some blocks lie behind each other as one row of values.

    Block by block, layer by layer in the order of ``layers``, first ``down`` [K, I], then ``up`` [O, K].
    """

    start: int
    """Number of the first block."""
    shapes: tuple[LayerShapes, ...]
    """The linear layers of each block, those that are not adapted among them."""
    layers: tuple[str, ...]
    """Paths of the layers that are adapted, in blocks that have such a layer."""
    rank: int
    scaling: float

    @property
    def end(self) -> int:
        """One past the last block."""
        return self.start + len(self.shapes)

    @cached_property
    def block_sizes(self) -> tuple[int, ...]:
        """The number of values of each block."""
        return tuple(
            sum(self.rank * (shape[0] + shape[1]) for _, shape in self._adapted(shapes)) for shapes in self.shapes
        )

    @property
    def num_values(self) -> int:
        """V."""
        return sum(self.block_sizes)

    def part(self, start: int, end: int) -> LoraLayout:
        """The layout of blocks ``start:end``."""
        return LoraLayout(
            start=start,
            shapes=self.shapes[start - self.start : end - self.start],
            layers=self.layers,
            rank=self.rank,
            scaling=self.scaling,
        )

    def place(self, start: int, end: int) -> slice:
        """Where the values of blocks ``start:end`` stand among all."""
        sizes = self.block_sizes
        first = sum(sizes[: start - self.start])
        return slice(first, first + sum(sizes[start - self.start : end - self.start]))

    def split(self, values_V: Tensor) -> Adapter:
        """Matrices that are views of a row of values; gradients flow back into it.

        Raises:
            InvalidRequestError: the row has another length.
        """
        if values_V.shape != (self.num_values,):
            raise InvalidRequestError(
                f"{list(values_V.shape)} values of low-rank matrices where rank {self.rank} of "
                f"{len(self.layers)} layers in blocks {self.start}:{self.end} asks for {self.num_values}"
            )
        sizes = [
            size
            for shapes in self.shapes
            for _, (inputs, outputs) in self._adapted(shapes)
            for size in (self.rank * inputs, outputs * self.rank)
        ]
        # One split instead of many slices: its backward puts the gradient together once.
        pieces = iter(values_V.split(sizes) if sizes else ())
        blocks: dict[int, dict[str, LowRank]] = {}
        for index, shapes in enumerate(self.shapes, self.start):
            blocks[index] = {
                path: LowRank(
                    down_KI=next(pieces).view(self.rank, inputs),
                    up_OK=next(pieces).view(outputs, self.rank),
                    scaling=self.scaling,
                )
                for path, (inputs, outputs) in self._adapted(shapes)
            }
        return Adapter(blocks=blocks)

    def join(self, matrices: Mapping[tuple[int, str], tuple[Tensor, Tensor]]) -> Tensor:
        """The row of values [V] of matrices by block and path; differentiable."""
        pieces = [
            matrix.reshape(-1)
            for index, shapes in enumerate(self.shapes, self.start)
            for path, _ in self._adapted(shapes)
            for matrix in matrices[index, path]
        ]
        return torch.cat(pieces)

    def adapted(self, index: int) -> Sequence[tuple[str, tuple[int, int]]]:
        """Paths and shapes of the layers of block ``index`` that are adapted."""
        return self._adapted(self.shapes[index - self.start])

    def _adapted(self, shapes: LayerShapes) -> list[tuple[str, tuple[int, int]]]:
        return [(path, shapes[path]) for path in self.layers if path in shapes]
