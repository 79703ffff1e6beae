"""Position ids that a model has no room for.

Some architectures (GPT-J, CodeGen) look positions up in a table. On a GPU an index outside of it would end the whole
process's use of the device, so it is refused before it gets there.
"""

from __future__ import annotations

from collections.abc import Sequence

from petals_core.errors import SessionLengthError
from petals_core.models.span import Span
from petals_server.columns import PositionRuns


def find_max_positions(span: Span) -> int | None:
    """How many positions the span's tables hold; None for a model without tables, which takes any."""
    declared = getattr(span.config, "max_position_embeddings", None)
    if not isinstance(declared, int):
        return None
    # Frequencies of rotary embeddings are vectors; a table has a row for each position.
    has_table = any(buffer.ndim >= 2 and declared in buffer.shape for _, buffer in span.model.named_buffers())
    return declared if has_table else None


def check_positions(
    row_tokens: Sequence[int],
    position_runs: PositionRuns | None,
    max_positions: int | None,
    *,
    row_lengths: Sequence[int] | None = None,
) -> None:
    """See that the positions of a request's new tokens are in the model's tables.

    Without ``position_runs`` they go on from ``row_lengths``, the cached tokens of each row.

    Raises:
        SessionLengthError: they are not.
    """
    if max_positions is None:
        return
    if position_runs is not None:
        needed = max((first + count for row in position_runs for first, count in row), default=0)
    elif row_lengths is None:
        needed = max(row_tokens)
    else:
        needed = max(length + count for length, count in zip(row_lengths, row_tokens, strict=True))
    if needed > max_positions:
        raise SessionLengthError(
            f"the model has {max_positions} positions and the request needs {needed}: shorten the text"
        )
