"""What a server keeps of its outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from petals_core.errors import (
    OutputsGoneError,
)
from petals_core.testing.network import run_clean
from petals_core.wire.messages import (
    NewAttempt,
    Replay,
    Replayed,
)
from petals_server.testing import TIMEOUT_S
from petals_server.testing.ring import (
    IDS,
    STATES,
    ask,
    chain,
    connect,
    step,
)


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
