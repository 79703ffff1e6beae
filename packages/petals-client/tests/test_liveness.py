"""Servers that are slow are waited for; those that have fallen silent are not."""

from __future__ import annotations

import asyncio

import pytest

from petals_client.liveness import attend
from petals_core.errors import DeadlineExceededError
from petals_core.net.dialer import PeerConnection
from petals_core.net.rpc import call
from petals_core.net.stream import Stream
from petals_core.testing.network import address_of, dialing, run_clean, serving
from petals_core.wire.messages import InfoRequest, ProgressRequest, Replayed
from petals_dht.testing import make_announcement, make_info

REQUEST = ProgressRequest(session_id=bytes(16))
INFO = make_info(make_announcement())


def test_who_gives_signs_of_life_is_waited_for() -> None:
    async def run() -> None:
        looks = 0
        enough = asyncio.Event()

        async def handle(stream: Stream) -> None:
            nonlocal looks
            message = await stream.receive(timeout_s=None)
            if isinstance(message.body, InfoRequest):
                looks += 1
                await stream.send(INFO, end=True)
                if looks == 3:
                    enough.set()
            else:
                await enough.wait()
                await stream.send(Replayed(last=7), end=True)

        async with serving(handle) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=None)
            answer = call(connection, REQUEST, reply=Replayed, timeout_s=60.0)
            message = await attend(answer, connection, drop=dialer.drop, first_look_s=0.01)
            assert message.body == Replayed(last=7)
            assert looks == 3

    run_clean(run())


def test_who_falls_silent_is_dropped() -> None:
    async def run() -> None:
        dropped: list[PeerConnection] = []

        async def handle(stream: Stream) -> None:
            await asyncio.Event().wait()

        async with serving(handle) as listener, dialing() as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=None)
            answer = call(connection, REQUEST, reply=Replayed, timeout_s=3600.0)
            with pytest.raises(DeadlineExceededError, match="no sign of life"):
                await attend(
                    answer, connection, drop=dropped.append, first_look_s=0.01, probe_s=lambda round_trip_s: 0.05
                )
            assert dropped == [connection]

    run_clean(run())
