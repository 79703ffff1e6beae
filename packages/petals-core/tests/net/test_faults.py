"""Every kind of fault at every step of a connection ends in the documented way, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from enum import StrEnum

import pytest

from petals_core.errors import PeerConnectionError, PetalsError, ProtocolError
from petals_core.identity import Identity
from petals_core.limits import MIB, WireLimits
from petals_core.net import rpc
from petals_core.net.tls import TlsChannel, dialer_context, listener_context
from petals_core.testing.faults import Direction, Fault, FaultKind, FaultProxy
from petals_core.testing.network import address_of, dialing, echo, run_clean, serving
from petals_core.wire.messages import InfoRequest

TO_LISTENER, TO_DIALER = Direction.TO_LISTENER, Direction.TO_DIALER
PATIENT = WireLimits()
IMPATIENT = WireLimits(ping_interval_s=0.1, idle_timeout_s=0.3, handshake_timeout_s=0.3)


class Step(StrEnum):
    TLS = "tls"
    HELLO = "hello"
    REQUEST = "request"
    REPLY = "reply"
    BULK = "bulk"


def handshake_bytes() -> dict[Direction, int]:
    """What TLS takes before the hello begins, in each direction."""
    dialer = TlsChannel(dialer_context(), is_listener=False)
    listener = TlsChannel(listener_context(Identity.ephemeral()), is_listener=True)
    dialer.handshake()
    first = dialer.take_outgoing()
    listener.handshake(first)
    answer = listener.take_outgoing()
    dialer.handshake(answer)
    return {TO_LISTENER: len(first) + len(dialer.take_outgoing()), TO_DIALER: len(answer)}


TLS_BYTES = handshake_bytes()


async def exchange(kind: FaultKind, step: Step, direction: Direction, limits: WireLimits) -> None:
    """Connect and call through a proxy with one fault; raises what the caller sees."""
    planned, sudden = [], None
    if step is Step.TLS:
        planned.append(Fault(kind=kind, direction=direction, after_bytes=100))
    elif step is Step.HELLO:
        planned.append(Fault(kind=kind, direction=direction, after_bytes=TLS_BYTES[direction] + 10))
    elif step is Step.BULK:
        sudden = Fault(kind=kind, direction=direction, after_bytes=MIB // 2)
    else:
        sudden = Fault(kind=kind, direction=direction)
    async with (
        serving(echo, limits=limits) as listener,
        FaultProxy(address_of(listener), planned) as proxy,
        dialing(limits=limits, connect_timeout_s=2 * limits.handshake_timeout_s) as dialer,
    ):
        releasing = asyncio.create_task(release(proxy))
        try:
            connection = await dialer.connect([proxy.address], peer_id=listener.peer_id)
            if sudden is not None:
                proxy.add(sudden)
            payload = bytes(MIB if step is Step.BULK else 1000)
            message = await rpc.call(connection, InfoRequest(), [payload], reply=InfoRequest, timeout_s=30)
            assert message.received_payload == payload
        finally:
            releasing.cancel()
            assert [fault.kind for fault in proxy.struck] == [kind]


async def release(proxy: FaultProxy) -> None:
    await proxy.until_struck()
    proxy.release()


def places() -> list[tuple[Step, Direction]]:
    return [
        (Step.TLS, TO_LISTENER),
        (Step.TLS, TO_DIALER),
        (Step.HELLO, TO_LISTENER),
        (Step.HELLO, TO_DIALER),
        (Step.REQUEST, TO_LISTENER),
        (Step.REPLY, TO_DIALER),
        (Step.BULK, TO_LISTENER),
        (Step.BULK, TO_DIALER),
    ]


@pytest.mark.parametrize(("step", "direction"), places())
@pytest.mark.parametrize("kind", [FaultKind.HOLD, FaultKind.SLOW])
def test_slow_network_changes_nothing(kind: FaultKind, step: Step, direction: Direction) -> None:
    run_clean(exchange(kind, step, direction, PATIENT))


@pytest.mark.parametrize(("step", "direction"), places())
@pytest.mark.parametrize("kind", [FaultKind.CUT, FaultKind.DROP])
def test_vanished_peer_is_a_lost_connection(kind: FaultKind, step: Step, direction: Direction) -> None:
    async def main() -> None:
        with pytest.raises(PeerConnectionError):
            await exchange(kind, step, direction, IMPATIENT)

    run_clean(main())


@pytest.mark.parametrize(("step", "direction"), places())
@pytest.mark.parametrize("kind", [FaultKind.CORRUPT, FaultKind.DUPLICATE, FaultKind.SKIP])
def test_damaged_bytes_are_never_taken_for_content(kind: FaultKind, step: Step, direction: Direction) -> None:
    async def main() -> None:
        with pytest.raises(PetalsError) as caught:
            await exchange(kind, step, direction, IMPATIENT)
        if step is Step.TLS:
            assert isinstance(caught.value, (PeerConnectionError, ProtocolError))
        else:
            assert isinstance(caught.value, PeerConnectionError)

    run_clean(main())
