"""The outputs that a server's sessions keep, so that who takes a next server's place can be brought to where that was.

All sessions share one budget of host memory.
"""

from __future__ import annotations

from petals_core.steps import StepHistory, StepRequest
from petals_core.tensors.states import States
from petals_core.wire.messages import Step


class KeptOutputs:
    """The histories of all open sessions of a server, within ``max_bytes`` together."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._histories: list[StepHistory[States]] = []

    def open(self) -> StepHistory[States]:
        """An empty history, of a session that begins."""
        history: StepHistory[States] = StepHistory(self._max_bytes)
        self._histories.append(history)
        return history

    def close(self, history: StepHistory[States]) -> None:
        """The session of a history is over."""
        self._histories.remove(history)
        self.num_bytes -= history.num_bytes

    def keep(self, history: StepHistory[States], step: Step, output: States) -> None:
        """Keep what came of a step; where there is no room, the session that has kept most keeps nothing any more."""
        before = history.num_bytes
        request = StepRequest(
            keep=step.keep, row_tokens=step.row_tokens, row_order=step.row_order, position_runs=step.position_runs
        )
        # A copy: the output may be a view of a whole batch's.
        states = States(spec=output.spec, payload=(b"".join(output.payload),))
        history.append(step.step, request, states, output.spec.num_bytes)
        self.num_bytes += history.num_bytes - before
        while self.num_bytes > self._max_bytes:
            largest = max(self._histories, key=lambda each: each.num_bytes)
            self.num_bytes -= largest.num_bytes
            largest.drop()
