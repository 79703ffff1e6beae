"""Listeners and dialers on the loopback interface, and a check that a test leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from petals_core.addresses import Address
from petals_core.identity import Identity
from petals_core.limits import ListenerLimits, WireLimits
from petals_core.net.dialer import Dialer
from petals_core.net.listener import Handler, Listener
from petals_core.net.loop import new_event_loop
from petals_core.net.stream import Stream
from petals_core.swarm_key import SwarmKey
from petals_core.wire.compression import Mode

T = TypeVar("T")
_MAX_TEST_S = 60.0
_SETTLING_TURNS = 10


def run_clean(
    main: Coroutine[Any, Any, T], *, loop_factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop
) -> T:
    """Run ``main`` on a new loop and return its result.

    Raises:
        AssertionError: ``main`` left a task, a timer or an open socket behind, or some callback failed.
    """
    failures: list[str] = []

    async def checked() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(str(context)))
        sockets = _open_sockets()
        # A swarm of other tests, in another thread, connects its servers to each other when it wants.
        elsewhere = {port for each in sockets for port in _ports(each, if_listening=True)}
        async with asyncio.timeout(_MAX_TEST_S):
            result = await main
        for _ in range(_SETTLING_TURNS):  # closing a socket takes the loop a few turns
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks are left behind"
        timers = [handle for handle in getattr(loop, "_scheduled", ()) if not handle.cancelled()]
        assert not timers, f"timers are left behind: {timers}"
        left = _open_sockets() - sockets
        assert all(_ports(each) & elsewhere for each in left), "sockets are left behind"
        return result

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        outcome = runner.run(checked())
    assert not failures, f"callbacks failed: {failures}"
    return outcome


@asynccontextmanager
async def serving(
    handler: Handler,
    *,
    identity: Identity | None = None,
    swarm_key: SwarmKey | None = None,
    host: str = "127.0.0.1",
    limits: WireLimits | None = None,
    listener_limits: ListenerLimits | None = None,
    compression: Mode = "none",
) -> AsyncIterator[Listener]:
    """A listener on a free port, that is closed at the end."""
    listener = await Listener.start(
        identity=identity or Identity.ephemeral(),
        handler=handler,
        swarm_key=swarm_key,
        host=host,
        limits=limits,
        listener_limits=listener_limits,
        compression=compression,
    )
    try:
        yield listener
    finally:
        await listener.close()


@asynccontextmanager
async def dialing(
    *,
    identity: Identity | None = None,
    swarm_key: SwarmKey | None = None,
    limits: WireLimits | None = None,
    connect_timeout_s: float = 10.0,
    compression: Mode = "none",
) -> AsyncIterator[Dialer]:
    """A dialer that is closed at the end."""
    dialer = Dialer(
        identity=identity or Identity.ephemeral(),
        swarm_key=swarm_key,
        limits=limits,
        connect_timeout_s=connect_timeout_s,
        compression=compression,
    )
    try:
        yield dialer
    finally:
        await dialer.close()


def address_of(listener: Listener, host: str = "127.0.0.1") -> Address:
    """Where to reach a listener from this machine."""
    return Address(host, listener.port)


async def echo(stream: Stream) -> None:
    """A handler that sends every message back, with its priority, until the peer ends the stream."""
    while True:
        message = await stream.receive(timeout_s=None)
        await stream.send(message.body, message.payload)


@dataclass(frozen=True, slots=True)
class _Socket:
    number: str
    """Of the kernel, which is given to no other socket soon."""
    descriptor: int = field(compare=False)


def _open_sockets() -> set[_Socket]:
    """The sockets of this process, where the system tells (Linux)."""
    folder = Path("/proc/self/fd")
    found = set()
    for entry in folder.iterdir() if folder.exists() else ():
        try:
            target = str(entry.readlink())
        except OSError:
            continue  # the descriptor that listed the folder
        if target.startswith("socket:"):
            found.add(_Socket(target, int(entry.name)))
    return found


def _ports(each: _Socket, *, if_listening: bool = False) -> set[int]:
    """The ports at both ends of a socket."""
    ports: set[int] = set()
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(each.descriptor)) as twin:  # it may be closed by now
        if if_listening and not twin.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return ports
        if twin.family in (socket.AF_INET, socket.AF_INET6):
            ports.add(twin.getsockname()[1])
            ports.add(twin.getpeername()[1])
    return ports
