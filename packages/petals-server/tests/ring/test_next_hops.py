"""Servers that are to be next and can't be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from petals_core.errors import NextHopError, PetalsError
from petals_core.testing.network import run_clean
from petals_core.wire.messages import Routed
from petals_server.testing import TIMEOUT_S, until
from petals_server.testing.ring import IDS, STATES, announcement, ask, chain, connect, route, step


def test_a_next_server_that_can_not_be_reached(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, first, second):
            encoded = announcement(to_second.server)
            with pytest.raises(NextHopError):  # it does not name the first one
                await ask(to_first, route(0, next=encoded, next_session=IDS[1]), Routed)
            with pytest.raises(PetalsError):
                await ask(to_first, route(0, next=encoded[:-1], next_session=IDS[1]), Routed)
            await connect(to_first, to_second)
            await second.stream.finish()
            outlet = to_first.server.holding.handler.ring._sessions[IDS[0]]._outlet._stream
            assert outlet is not None
            await until(lambda: not outlet.is_open)
            await first.stream.send(*step(0, STATES, 0))
            with pytest.raises(NextHopError):
                await first.stream.receive(timeout_s=TIMEOUT_S)

    run_clean(run())


def test_nobody_learns_through_a_server_what_listens_where(checkpoint: Path) -> None:
    """One answer whatever is wrong with the next server, and only so many of them; who can be reached costs nothing."""

    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, _, _):
            for _ in range(40):
                await connect(to_first, to_second)
                await ask(to_first, route(0), Routed)
            there = announcement(to_second.server)
            elsewhere = to_second.server.address = replace(to_second.server.address, port=9)
            nowhere = announcement(to_second.server)
            told = []
            for encoded in [there, nowhere] * 20:
                with pytest.raises(NextHopError) as caught:  # where it listens, there is no session of that id
                    await ask(to_first, route(0, next=encoded, next_session=bytes(16)), Routed)
                told.append(caught.value.message)
            assert set(told[:32]) == {"the next server can't be reached"}
            assert set(told[36:]) == {"too many next servers can't be reached: try again in a minute"}
            assert str(elsewhere) not in "".join(told)

    run_clean(run())


def test_a_public_server_connects_to_no_private_network_for_a_stranger(checkpoint: Path) -> None:
    async def run() -> None:
        async with chain(checkpoint) as (to_first, to_second, _, _):
            to_first.server.holding.handler.ring.next_hops._is_local = False  # as where its own address is a public one
            with pytest.raises(NextHopError, match="private network"):
                await ask(to_first, route(0, next=announcement(to_second.server), next_session=IDS[1]), Routed)
            to_second.server.address = replace(to_second.server.address, host="localhost")
            with pytest.raises(NextHopError, match="can't be reached"):  # nor where a name leads into one
                await connect(to_first, to_second)

    run_clean(run())
