"""Hidden states between blocks, for ``output_hidden_states``: the blocks run in parts that end where one is wanted.

A server returns what comes out of the last block that it was asked for and nothing in between, so every state that is
wanted costs a trip of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.chain import Chain, ChainSession, StepRequest
from petals_client.trace import StepTrace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StateCollector:
    """Gathers the states [R, T, H] that one forward was asked for; pads are zeros."""

    wanted: frozenset[int]
    """Numbers of blocks that lie before a state; 0 is what goes into the first."""
    states: dict[int, Tensor] = field(default_factory=dict)

    def bounds(self, start: int, end: int) -> tuple[int, ...]:
        """Where the parts of blocks ``start:end`` begin and end."""
        return (start, *sorted(block for block in self.wanted if start < block < end), end)


class SplitSession:
    """A ``ChainSession`` of one session for each part of the blocks, which keeps the states between the parts."""

    def __init__(
        self,
        chain: Chain,
        bounds: Sequence[int],
        *,
        num_rows: int,
        max_length: int,
        adaptation: Adaptation | None = None,
    ) -> None:
        """Open all sessions; on failure none is left open.

        Raises:
            PetalsError: no chain could be opened for one of the parts.
        """
        self.bounds = tuple(bounds)
        self.states: dict[int, Tensor] = {}
        """Of the last step: packed states [N, H] by the number of blocks before them, the last one included."""
        self._parts: list[ChainSession] = []
        try:
            for start, end in pairwise(self.bounds):
                self._parts.append(
                    chain.open_session(
                        start=start, end=end, num_rows=num_rows, max_length=max_length, adaptation=adaptation
                    )
                )
        except BaseException:
            self.close()
            raise

    def step(self, hidden: Tensor, request: StepRequest, *, num_wanted: int | None = None) -> Tensor:
        """See ``ChainSession.step``. All states travel."""
        self.states = {}
        for end, part in zip(self.bounds[1:], self._parts, strict=True):
            hidden = self.states[end] = part.step(hidden, request)
        return hidden

    def trace(self) -> tuple[StepTrace, ...]:
        """See ``ChainSession.trace``."""
        return tuple(
            StepTrace(
                num_tokens=steps[0].num_tokens,
                total_s=sum(step.total_s for step in steps),
                hops=tuple(hop for step in steps for hop in step.hops),
            )
            for steps in zip(*(part.trace() for part in self._parts), strict=False)
        )

    def close(self) -> None:
        """See ``ChainSession.close``."""
        for part in self._parts:
            part.close()
