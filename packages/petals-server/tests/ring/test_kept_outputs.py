"""What a server keeps of its outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.errors import OutputsGoneError
from petals_core.steps import StepHistory
from petals_core.tensors.codec import encode
from petals_core.tensors.states import States
from petals_core.testing.network import run_clean
from petals_core.wire.messages import NewAttempt, Replay, Replayed
from petals_server.ring.kept_outputs import KeptOutputs
from petals_server.testing import TIMEOUT_S
from petals_server.testing.ring import IDS, STATES, ask, chain, connect, step


def test_outputs_are_kept_within_a_budget(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint, max_kept_bytes=1000) as (to_first, to_second, first, second):
            await connect(to_first, to_second)
            ring = to_first.server.holding.handler.ring
            for number in range(3):
                await first.stream.send(*step(number, STATES[:1], number))
                await second.stream.receive(timeout_s=TIMEOUT_S)
                assert ring.outputs.num_bytes <= 1000
            request = Replay(session_id=IDS[0], attempt=1, before=3, passes=0, max_tokens=100, deadline_ms=5000)
            await second.stream.send(NewAttempt(attempt=1))
            assert await ask(to_first, request, Replayed) == Replayed(last=2)
            await second.stream.receive(timeout_s=TIMEOUT_S)
            await first.stream.send(*step(3, STATES, 3, attempt=1))
            await second.stream.receive(timeout_s=TIMEOUT_S)
            assert ring.outputs.num_bytes == 0
            with pytest.raises(OutputsGoneError):
                await ask(to_first, request, Replayed)

    run_clean(run())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=40))
def test_all_sessions_share_one_budget(actions: list[tuple[int, int, bool]]) -> None:
    """Whatever they do, and nothing is left of it at their end."""
    outputs = KeptOutputs(12 * STATES[:1].nbytes)
    sessions: dict[int, tuple[StepHistory[States], int]] = {}
    for session, num_tokens, is_over in actions:
        if is_over:
            if session in sessions:
                outputs.close(sessions.pop(session)[0])
        else:
            history, columns = sessions.get(session) or (outputs.open(), 0)
            spec, payload = encode(STATES[:1].repeat(num_tokens, 1))
            request, _ = step(columns, STATES[:1].repeat(num_tokens, 1), columns)
            outputs.keep(history, request, States(spec=spec, payload=tuple(payload)))
            sessions[session] = history, columns + num_tokens
        sizes = [history.num_bytes for history, _ in sessions.values()]
        assert outputs.num_bytes == sum(sizes) <= 12 * STATES[:1].nbytes
        assert all(history.is_complete or history.num_bytes == 0 for history, _ in sessions.values())
    for history, _ in sessions.values():
        outputs.close(history)
    assert outputs.num_bytes == 0
