"""What computes blocks, seen from the model: two calls on packed hidden states.

Letters: N tokens of all rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from petals_core.steps import StepRequest as StepRequest

if TYPE_CHECKING:
    from torch import Tensor

    from petals_client.adaptation import Adaptation
    from petals_client.packing import PositionRuns
    from petals_client.routing.explanation import Route
    from petals_client.trace import StepTrace


class ChainSession(Protocol):
    """An attention cache that lies with the servers of one chain."""

    def step(self, hidden: Tensor, request: StepRequest, *, num_wanted: int | None = None) -> Tensor:
        """Append tokens and return their hidden states [N, H] behind the last block, in the same dtype on the CPU.

        With ``num_wanted`` those of the last so many columns are; others may be zero, because they need not travel.

        Raises:
            PetalsError: the step was not done; the session is lost.
        """

    def trace(self) -> tuple[StepTrace, ...]:
        """Where the time of the last steps went."""

    def close(self) -> None:
        """Free the cache; idempotent, never raises, does not wait for the servers."""


class Chain(Protocol):
    """Access to all blocks of one model."""

    @property
    def num_blocks(self) -> int: ...

    def forward(
        self,
        hidden: Tensor,
        *,
        start: int,
        end: int,
        row_tokens: tuple[int, ...],
        position_runs: PositionRuns | None,
    ) -> Tensor:
        """Compute whole rows without a cache; returns [N, H] in the same dtype on the CPU.

        Raises:
            PetalsError: no chain could do it.
        """

    def forward_for_training(
        self,
        hidden: Tensor,
        prompts: Tensor | None,
        *,
        start: int,
        end: int,
        row_tokens: tuple[int, ...],
        position_runs: PositionRuns | None,
        keeps_graphs: bool,
        adaptation: Adaptation | None = None,
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Compute rows as ``forward`` does; returns also what ``backward`` needs: a trace, and hidden states.

        ``prompts`` [end - start, 1 or rows, P, H] are added to the states of each row's first P tokens before each
        block. Servers are asked to keep the graph where ``keeps_graphs``. ``adaptation`` changes the blocks.

        Raises:
            PetalsError: no chain could do it.
        """

    def backward(
        self, trace: Any, inputs: Sequence[Tensor], prompts: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of what went into a ``forward_for_training``, any number of times.

        They are those of the hidden states [N, H], of the prompts, and of the values [V] of the client's own matrices
        for these blocks; None where there were none.

        Raises:
            PetalsError: no chain could do it.
        """

    def open_session(
        self,
        *,
        start: int,
        end: int,
        num_rows: int,
        max_length: int,
        prompts: Tensor | None = None,
        adaptation: Adaptation | None = None,
    ) -> ChainSession:
        """Open a session on blocks ``start:end`` for up to ``max_length`` columns.

        ``prompts`` [end - start, 1, P, H] are added to the states of each row's first P tokens before each block.
        ``adaptation`` changes the blocks for as long as the session lasts.

        Raises:
            PetalsError: no chain could be opened.
        """

    def explain_route(self, start: int, end: int) -> Route:
        """The chain that a new session on blocks ``start:end`` would use, what each edge costs, and why others lost.

        Raises:
            PetalsError: there is no chain.
        """

    def close(self) -> None:
        """Let go of all connections; idempotent."""
