"""Calls that may take long, to servers that may fall silent meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from petals_client.patience import FIRST_WAIT_S, MAX_WAIT_S, Patience
from petals_core.errors import DeadlineExceededError, PetalsError
from petals_core.net.dialer import PeerConnection
from petals_core.net.rpc import call
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Info, InfoRequest

T = TypeVar("T")


async def attend(
    answer: Awaitable[T],
    connection: PeerConnection,
    *,
    drop: Callable[[PeerConnection], None],
    first_look_s: float = FIRST_WAIT_S,
    probe_s: Callable[[float], float] = Patience.probe_s,
) -> T:
    """Wait for ``answer``, and ask the server now and then for a sign of life, which it gives also while it computes.

    It gets ``probe_s`` of the round trip for that. The connection to one that gives none is given to ``drop``. When
    this is cancelled, so is the answer.

    Raises:
        DeadlineExceededError: the server has fallen silent.
        PetalsError: what ``answer`` raises.
    """
    waiting = asyncio.ensure_future(answer)
    wait_s = first_look_s
    try:
        while not (await asyncio.wait((waiting,), timeout=wait_s))[0]:
            timeout_s = probe_s(connection.rtt_s)
            try:
                await call(connection, InfoRequest(), reply=Info, priority=Priority.DECODE, timeout_s=timeout_s)
            except DeadlineExceededError:
                if not waiting.done():
                    drop(connection)
                    raise DeadlineExceededError(f"no sign of life within {timeout_s:.1f} s") from None
            except PetalsError:
                pass  # too busy to say, or the connection is lost, which the answer tells too
            wait_s = min(MAX_WAIT_S, 2 * wait_s)
        return waiting.result()
    finally:
        waiting.cancel()
        await asyncio.wait((waiting,))
        if not waiting.cancelled():
            waiting.exception()
