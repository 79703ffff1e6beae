"""Experts that a checkpoint stores one by one, read straight into the tensor that holds all of a block's.

Read against Transformers 5.17 and 5.23.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from petals_core.models.checkpoint import LazyTensor
from petals_core.models.safetensors_file import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FusedTensor(LazyTensor):
    """Many stored tensors as one: ``parts[e]`` is what lies below each other in row ``e`` of the first dimension.

    Stands for one tensor of ``shape`` [len(parts), sum of the parts' rows, ...]. Each part is read, cast and let go
    before the next, so that no more than one is held beside the whole.
    """

    __slots__ = ("_dtype", "_parts", "_shape")

    def __init__(self, name: str, parts: Sequence[Sequence[LazyTensor]], shape: torch.Size, dtype: torch.dtype) -> None:
        first = parts[0][0]
        super().__init__(first._checkpoint, name)
        self._parts = parts
        self._shape = shape
        self._dtype = dtype

    def __getitem__(self, key: object) -> torch.Tensor:
        whole = torch.empty(self._shape, dtype=self._dtype)
        for index, parts in enumerate(self._parts):
            row = 0
            for part in parts:
                num_rows = part.shape[0]
                whole[index, row : row + num_rows] = part[...]
                row += num_rows
        return whole if key is Ellipsis else whole[key]  # type: ignore[index]

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return dtype_name(self._dtype)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype


def fuse_experts(model: PreTrainedModel, tensors: MutableMapping[str, LazyTensor]) -> None:
    """Have experts that are stored one by one read straight into the tensor that holds all of a block's.

    Transformers stacks them and concatenates the stacks, which takes up to three times a block's experts for a moment:
    with one block on a server, more than the server's budget. This does the two conversions that it knows
    (``MergeModulelist``, alone or followed by a ``Concatenate`` of rows) in place, and leaves all others to
    Transformers, as well as tensors whose number or shapes are not what the model wants.

    Relies on ``get_model_conversion_mapping``, ``rename_source_key``, ``dot_natural_key`` (the order of the experts)
    and on a tensor that comes under its final name being taken as it is.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    sources_of: dict[str, list[str]] = {}
    for converter in converters:
        operations: list[Any] = list(converter.operations)
        kinds = [type(operation) for operation in operations]
        if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]):
            continue
        if [operation.dim for operation in operations] == [0, 1][: len(operations)]:
            sources_of.update({source: list(converter.source_patterns) for source in converter.source_patterns})
    if not sources_of:
        return
    wanted = model.state_dict()
    groups: dict[str, dict[str, list[str]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, source = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if source in sources_of and target in wanted:
            groups.setdefault(target, {}).setdefault(source, []).append(name)
    for target, names_of in groups.items():
        columns = [names_of.get(source, []) for source in sources_of[next(iter(names_of))]]
        num_experts, num_rows, *rest = wanted[target].shape
        if any(len(column) != num_experts for column in columns):
            continue
        parts = [[tensors[column[index]] for column in columns] for index in range(num_experts)]
        if all(
            sum(part.shape[0] for part in row) == num_rows and all(list(part.shape[1:]) == rest for part in row)
            for row in parts
        ):
            for column in columns:
                for name in column:
                    del tensors[name]
            tensors[target] = FusedTensor(target, parts, wanted[target].shape, wanted[target].dtype)
