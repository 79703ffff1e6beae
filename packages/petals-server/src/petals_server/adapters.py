"""Adapters on a server: those that it was told to load, and how they change a span while it computes."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from petals_core.errors import ConfigurationError, MissingAdapterError
from petals_core.limits import MAX_ADAPTERS
from petals_core.models.adapter_files import AdapterFiles
from petals_core.models.low_rank import Adapter, LowRank, linear_layers
from petals_core.models.span import Span
from petals_server.config import ServerConfig

log = logging.getLogger(__name__)


def matrix_dtype(span: Span) -> torch.dtype:
    """What low-rank products are computed in: float32 beside narrower weights, as PEFT does."""
    return torch.float64 if span.dtype is torch.float64 else torch.float32


def load_adapters(span: Span, config: ServerConfig) -> Mapping[str, Adapter]:
    """Load what of the configured adapters belongs to the span's blocks, by their whole names.

    Raises:
        CheckpointError: one can't be read.
        ConfigurationError: one does not fit the model, or two have one name.
    """
    if len(config.adapters) > MAX_ADAPTERS:
        raise ConfigurationError(f"{len(config.adapters)} adapters: a server takes at most {MAX_ADAPTERS}")
    loaded: dict[str, Adapter] = {}
    architecture = span.architecture
    for text in config.adapters:
        name, separator, path = text.partition("=")
        files = AdapterFiles.open(
            path if separator else text,
            name=name if separator else None,
            token=config.token,
            cache_dir=config.cache_dir,
        )
        own = files.name.partition("@")[0]
        if any(own == each.partition("@")[0] for each in loaded):
            raise ConfigurationError(f"two adapters are called {own}: give one of them as NAME=PATH")
        files.check_blocks(architecture.block_path, architecture.num_blocks)
        adapter = files.load(
            block_path=architecture.block_path,
            start=span.start,
            shapes=[linear_layers(block) for block in span.blocks],
            model_type=str(span.config.model_type),
            device=span.device,
            dtype=matrix_dtype(span),
        )
        loaded[files.name] = adapter
        log.info("loaded adapter %s: %.1f MiB for these blocks", files.name, adapter.num_bytes / 2**20)
        if outside := files.outside(architecture.block_path):
            log.warning(
                "adapter %s also has %s, which clients compute: they load them with tuned=%s",
                files.name,
                ", ".join(outside[:3]) + (" and more" if len(outside) > 3 else ""),
                files.source,
            )
    return loaded


def find_adapter(adapters: Mapping[str, Adapter], name: str) -> Adapter:
    """An adapter by its whole name; raises ``MissingAdapterError`` if it is not among the loaded ones."""
    adapter = adapters.get(name)
    if adapter is None:
        known = ", ".join(adapters) or "no adapters"
        raise MissingAdapterError(f"this server does not have the adapter {name[:80]}: it has {known}")
    return adapter


Part = tuple[Adapter, slice | None]
"""An adapter, and the tokens of a batch that it changes; None: all."""


@contextmanager
def adapted(span: Span, parts: Sequence[Part]) -> Iterator[None]:
    """Let adapters change what the span's layers put out, each for its own tokens.

    Tokens are counted as they lie in the hidden states [rows, columns, width] taken as [rows * columns, width].
    Gradients flow to the matrices that require them.
    """
    with ExitStack() as stack:
        for index, block in enumerate(span.blocks if parts else (), span.start):
            changes: defaultdict[str, list[tuple[LowRank, slice | None]]] = defaultdict(list)
            for adapter, tokens in parts:
                for path, matrices in adapter.blocks.get(index, {}).items():
                    changes[path].append((matrices, tokens))
            for path, change in changes.items():
                handle = block.get_submodule(path).register_forward_hook(functools.partial(_add, change=change))
                stack.callback(handle.remove)
        yield


def _add(
    layer: object,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    *,
    change: Sequence[tuple[LowRank, slice | None]],
) -> torch.Tensor:
    """What a layer puts out with the products of its inputs added."""
    for matrices, tokens in change:
        if tokens is None:
            output = _sum(output, matrices.product(inputs[0]))
            continue
        # In place, because a batch of many sessions has many parts; such batches have no gradients.
        output = output.contiguous()
        place = output.view(-1, output.shape[-1])[tokens]
        place.copy_(_sum(place, matrices.product(inputs[0].reshape(-1, inputs[0].shape[-1])[tokens])))
    return output


def _sum(output: torch.Tensor, product: torch.Tensor) -> Any:
    """In the dtype of the products, which is at least as wide, and then in the output's own."""
    return (output + product).to(output.dtype)
