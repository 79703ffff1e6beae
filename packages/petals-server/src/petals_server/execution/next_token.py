"""The next token of a session that is alone, from the bytes that came to those that go.

No step comes more often, and what is done for it beside computing it may take as long as the computing. So it has a way
of its own, without what a step of many tokens and a turn of several sessions need. A step that is not exactly as
expected takes the general way, which also says what is wrong with it.

Letters: T tokens, of which there is one; H hidden size.
"""

# ruff: noqa: N806 -- tensors are named by their shape

from __future__ import annotations

from typing import Final, final

import torch

from petals_core.tensors.codec import bytes_of, encode
from petals_core.tensors.states import States
from petals_core.wire.messages import Step
from petals_server.execution.session import SessionState
from petals_server.execution.steps import StepRunner
from petals_server.scheduling.request import Urgency

_ONE_TOKEN: Final = (1,)


@final
class NextToken:
    """A session's way for its next tokens. Belongs to the event loop."""

    def __init__(self, session: SessionState, runner: StepRunner, *, max_positions: int | None) -> None:
        """``max_positions`` of the model; None: any."""
        span = session.span
        self.session = session
        self._runner = runner
        self._is_possible = (
            session.ledger.num_rows == 1
            and session.prompts is None
            and not session.adapters
            and span.device.type == "cpu"
        )
        self._most = session.max_length if max_positions is None else min(session.max_length, max_positions)
        self._input_TH = torch.zeros(1, span.hidden_size, dtype=span.dtype)
        self._input_bytes = bytes_of(self._input_TH)
        self._spec, _ = encode(self._input_TH)
        shape, *rest = self._spec.to_wire()
        self._tensors = ((tuple(shape), *rest),)
        """As a step describes them: in the span's own dtype, and not compressed."""
        self._inference = torch.inference_mode()

    def fits(self, step: Step, payload: memoryview) -> bool:
        """Whether a step is one that :meth:`compute` computes."""
        past = self.session.ledger.num_columns
        return (
            self._is_possible
            and step.row_tokens == _ONE_TOKEN
            and step.keep == past < self._most
            and not self.session.is_broken
            and step.tensors == self._tensors
            and payload.nbytes == self._spec.num_bytes
            and step.row_order is None
            and step.position_runs is None
            and self.session.pages.has_place(0, past)
        )

    def compute(self, payload: memoryview) -> States | None:
        """Append a token that :meth:`fits` and compute it, with the device alone; None: this has to go the general way.

        Raises:
            Exception: whatever the computation does; what the cache holds is unknown then, and the session is broken.
        """
        session, trace = self.session, self._runner.quick_trace
        if trace is None:
            return None
        past = session.ledger.num_columns
        self._input_bytes[:] = payload
        self._runner.threads.apply(Urgency.DECODE)
        session.is_broken = True  # until the token is complete
        with self._inference:
            output_TH = trace.run(self._input_TH, past, past, session.pages.runs(0))
        if output_TH is None:
            session.is_broken = False
            return None
        session.ledger.append(_ONE_TOKEN)
        session.pages.slide(0, past + 1)
        session.is_broken = False
        if output_TH.dtype != self._input_TH.dtype:
            output_TH = output_TH.to(self._input_TH.dtype)
        elif output_TH.data_ptr() == self._input_TH.data_ptr():
            output_TH = output_TH.clone()  # blocks that write into what they are given: the next token comes there
        return States(spec=self._spec, payload=(bytes_of(output_TH),))
