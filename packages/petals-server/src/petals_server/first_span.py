"""With which blocks a server starts, as far as its configuration and its memory say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from petals_core.errors import ConfigurationError, NotEnoughMemoryError

if TYPE_CHECKING:
    from petals_server.config import ServerConfig
    from petals_server.loading import OpenedModel


def first_span(config: ServerConfig, opened: OpenedModel) -> tuple[int, int]:
    """The blocks that are configured; else (0, n), where n blocks are to be held and the swarm says which.

    Raises:
        ConfigurationError: the model has no such blocks.
        NotEnoughMemoryError: there is no memory for one block.
    """
    if config.blocks is not None:
        start, end = config.blocks
        if end > opened.num_blocks:
            raise ConfigurationError(
                f"{opened.checkpoint.name} has blocks 0:{opened.num_blocks}, which do not include {start}:{end}"
            )
        return start, end
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_blocks = min(opened.num_blocks, opened.num_blocks_that_fit)
        if num_blocks == 0:
            raise NotEnoughMemoryError(
                f"a block of {opened.checkpoint.name} takes {opened.block_bytes / 2**20:,.0f} MiB, for which there "
                "is no memory: free some, or use a smaller --torch-dtype"
            )
    if num_blocks > opened.num_blocks:
        raise ConfigurationError(f"--num-blocks {num_blocks}: the model has only {opened.num_blocks} blocks")
    return 0, num_blocks
