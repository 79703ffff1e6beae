"""A server as a process: from its configuration to the signal that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from petals_core.terminal import EXIT_INTERRUPTED
from petals_server.loading_display import LoadingDisplay
from petals_server.status import remove_record, save_record

if TYPE_CHECKING:
    from petals_server.config import ServerConfig
    from petals_server.server import Server

log = logging.getLogger(__name__)

_RECORD_INTERVAL_S: Final = 5.0


async def serve_until_told(config: ServerConfig) -> None:
    """Serve, say on stdout how to join, and leave the swarm when SIGINT or SIGTERM comes; a second one ends at once."""
    from petals_server.server import DRAIN_TIMEOUT_S, Server

    wants_stop = asyncio.Event()
    display = LoadingDisplay()
    is_ready = False

    def on_signal() -> None:
        if wants_stop.is_set() or not is_ready:
            # While it loads there is nothing to withdraw, and no way to interrupt the thread that does it.
            display.close()
            os._exit(EXIT_INTERRUPTED)
        wants_stop.set()

    log.info("note: a server can read whatever passes through it, and so can everybody who runs one")
    with _signals_go_to(on_signal):
        with display:
            server = await Server.start(config, display.report)
        is_ready = True
        writer = asyncio.create_task(_write_down(server), name="petals status")
        span = server.model.span
        print(
            f"serving {server.model.name} blocks {span.start}:{span.end} · join with --initial-peers {server.address}",
            flush=True,
        )
        await wants_stop.wait()
        log.info(
            "leaving the swarm; %d open session(s) may end within %.0f s; Ctrl-C again leaves at once",
            server.num_sessions,
            DRAIN_TIMEOUT_S,
        )
        await server.stop(DRAIN_TIMEOUT_S)
        writer.cancel()
        await asyncio.wait([writer])


async def _write_down(server: Server) -> None:
    """Write down how the server is, again and again; cancel it at the end."""
    path = None
    try:
        while True:
            path = save_record(server.record())
            await asyncio.sleep(_RECORD_INTERVAL_S)
    finally:
        remove_record(path)


@contextlib.contextmanager
def _signals_go_to(handler: Callable[[], None]) -> Iterator[None]:
    """Call ``handler`` in the event loop on Ctrl-C and SIGTERM; afterwards signals do what they did before."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        try:
            loop.add_signal_handler(number, handler)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(handler))
    try:
        yield
    finally:
        for number, action in before.items():
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)
            signal.signal(number, action)
