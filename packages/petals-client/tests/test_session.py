"""Steps as they go out, and as a server that can't pass them on sends them back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from petals_client.session import is_of_request, make_step
from petals_core.steps import StepRequest
from petals_core.tensors.codec import encode
from petals_core.tensors.states import States


def test_a_step_asks_for_what_it_was_sent_to_ask_for() -> None:
    request = StepRequest(keep=3, row_tokens=(2, 2), row_order=(1, 0), wanted=1, join_tokens=64)
    spec, payload = encode(torch.zeros(4, 8))
    step = make_step(7, request, States(spec=spec, payload=payload), 1, 2.0)
    assert (step.step, step.attempt, step.deadline_ms, step.join_tokens) == (7, 1, 2000, 64)
    assert is_of_request(step, request)
    assert is_of_request(replace(step, join_tokens=None), request), "of a server that does not know the field"


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": 2},
        {"row_tokens": (2, 1)},
        {"row_order": None},
        {"position_runs": (((0, 2),), ((0, 2),))},
        {"wanted": None},
    ],
)
def test_a_step_that_was_changed_does_not(changes: dict[str, object]) -> None:
    request = StepRequest(keep=3, row_tokens=(2, 2), row_order=(1, 0), wanted=1)
    spec, payload = encode(torch.zeros(4, 8))
    step = make_step(7, request, States(spec=spec, payload=payload), 1, 2.0)
    assert not is_of_request(replace(step, **changes), request)
