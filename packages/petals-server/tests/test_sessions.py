"""The table of sessions: waiting in the event loop, refusals, and nothing left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from petals_core.errors import CacheLostError, OverloadedError
from petals_core.identity import Identity
from petals_core.testing.network import run_clean
from petals_server.config import ServerLimits
from petals_server.sessions import Reservation, SessionTable

ALICE, BOB = Identity.ephemeral().peer_id, Identity.ephemeral().peer_id
LONG_S = 1000.0


class Table(SessionTable):
    """Promises all that a session may need, so that amounts are easy to follow."""

    def __init__(self, cache_tokens: int, **settings: Any) -> None:
        super().__init__(cache_tokens=cache_tokens, limits=ServerLimits(**settings.pop("limits", {})), **settings)
        self._admission.promise_share = 1.0

    async def enter(self, peer_id: Any, num_rows: int, max_length: int, wait_s: float = LONG_S) -> Reservation:
        return await self.open(peer_id, num_rows=num_rows, max_length=max_length, deadline_s=time.monotonic() + wait_s)

    async def step(self, reservation: Reservation, num_tokens: int, wait_s: float = LONG_S) -> None:
        await self.grow(reservation, num_tokens, deadline_s=time.monotonic() + wait_s)
        self.settle(reservation)


def running(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    return lambda: run_clean(test())


@running
async def test_tokens_are_taken_and_given_back() -> None:
    table = Table(100, page_tokens=16)
    first = await table.enter(ALICE, 2, 30)
    assert (len(table), table.cache_tokens_left) == (1, 100 - 2 * 32)
    with pytest.raises(OverloadedError, match="needs 48 tokens of attention cache, and 100 of 100 are free") as refusal:
        await table.enter(BOB, 1, 33, wait_s=0.01)
    assert refusal.value.retry_after_s == ServerLimits().retry_after_s
    waiting = asyncio.ensure_future(table.enter(BOB, 1, 33))
    await asyncio.sleep(0)
    assert (len(table), table.num_waiting, waiting.done()) == (1, 1, False)
    table.close(first)
    table.close(await waiting)
    assert (len(table), table.num_waiting, table.cache_tokens_left) == (0, 0, 100)


@running
async def test_recurrent_states_take_room_for_each_row() -> None:
    table = Table(100, state_tokens=7)
    await table.enter(ALICE, 2, 30)
    assert table.cache_tokens_left == 100 - 2 * 37


@running
async def test_limits_of_sessions() -> None:
    table = Table(100, limits={"max_sessions_per_peer": 2, "max_sessions": 3, "max_waiting_sessions": 1})
    sessions = [await table.enter(ALICE, 1, 1) for _ in range(2)]
    with pytest.raises(OverloadedError, match="2 sessions open here"):
        await table.enter(ALICE, 1, 1)
    with pytest.raises(OverloadedError, match="may need 101 tokens of attention cache and this server has 100"):
        await table.enter(BOB, 1, 101)
    await table.enter(BOB, 1, 1)
    waiting = asyncio.ensure_future(table.enter(BOB, 1, 1))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="1 sessions wait for room already"):
        await table.enter(Identity.ephemeral().peer_id, 1, 1)
    table.close(sessions[0])
    await waiting
    assert len(table) == 3


@running
async def test_who_stops_waiting_leaves_nothing_behind() -> None:
    table = Table(100)
    first = await table.enter(ALICE, 1, 100)
    waiting = asyncio.ensure_future(table.enter(BOB, 1, 10))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert table.num_waiting == 0
    table.close(first)
    table.close(first)
    assert (len(table), table.cache_tokens_left) == (0, 100)


@running
async def test_a_step_that_finds_no_room_leaves_its_session_as_it_was() -> None:
    table = Table(100)
    table._admission.promise_share = 0.125
    old, young = await table.enter(ALICE, 1, 100), await table.enter(BOB, 1, 100)
    await table.step(old, 60)
    await table.step(young, 40)
    with pytest.raises(OverloadedError, match="the step needs 1 tokens of attention cache, and 0 of 100"):
        await table.step(young, 41, wait_s=0.01)
    await table.step(young, 40)
    waiting = asyncio.ensure_future(table.step(young, 50))
    await asyncio.sleep(0)
    await table.grow(old, 60, deadline_s=0)
    table.settle(old, 30)  # it has taken tokens back
    await waiting
    assert table.cache_tokens_held == 80


@running
async def test_who_has_to_give_way_is_told() -> None:
    table = Table(100)
    table._admission.promise_share = 0.25
    freed: list[str] = []
    lent = [await table.enter(BOB, 1, 100) for _ in range(2)]
    promised = await table.enter(ALICE, 1, 100)
    for number, session in enumerate(lent):
        session.on_evicted = lambda number=number: freed.append(f"session {number}")  # type: ignore[misc]
        await table.step(session, 50)
    waiting = asyncio.ensure_future(table.step(lent[1], 60))
    await asyncio.sleep(0)
    await table.step(promised, 25)
    with pytest.raises(CacheLostError, match="open it again"):
        await waiting
    with pytest.raises(CacheLostError):
        await table.step(lent[1], 1)
    assert (freed, len(table), table.num_evicted) == (["session 1"], 2, 1)
    for session in (*lent, promised):
        table.close(session)
    assert table.cache_tokens_left == 100
