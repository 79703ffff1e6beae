"""Whose a session is."""

from __future__ import annotations

from pathlib import Path

import pytest

from petals_core.errors import InvalidRequestError, NoSessionError
from petals_core.testing.network import run_clean
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Progress, ProgressRequest, Push, Replay, Replayed, Routed
from petals_server.testing import TIMEOUT_S, connected
from petals_server.testing.ring import IDS, STATES, ask, chain, connect, route, step, tensor


def test_nobody_pushes_into_anothers_session(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second), connected(to_second.server) as stranger:
            await connect(to_first, to_second)
            for session_id in (IDS[1], b"c" * 16):  # one that exists, and one that does not
                stream = stranger.connection.open_stream(Priority.DECODE)
                await stream.send(Push(session_id=session_id))
                with pytest.raises(NoSessionError):
                    await stream.receive(timeout_s=TIMEOUT_S)
                for request, reply in (
                    (route(1, is_last=True), Routed),
                    (ProgressRequest(session_id=session_id), Progress),
                    (
                        Replay(session_id=session_id, attempt=1, before=1, passes=0, max_tokens=9, deadline_ms=99),
                        Replayed,
                    ),
                ):
                    with pytest.raises(NoSessionError):
                        await ask(stranger, request, reply)
            await first.stream.send(*step(0, STATES, 0))
            assert tensor(await second.stream.receive(timeout_s=TIMEOUT_S)).shape == STATES.shape, "it was disturbed"

    run_clean(run())


def test_a_session_id_is_used_once(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, _, _, _):
            with pytest.raises(InvalidRequestError, match="random"):
                await to_first.open(session_id=IDS[0])

    run_clean(run())
