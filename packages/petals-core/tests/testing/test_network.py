"""The check for leftovers sees them."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest

from petals_core.testing.network import run_clean


def test_task_left_behind_is_seen() -> None:
    async def main() -> None:
        main.task = asyncio.create_task(asyncio.Event().wait())  # type: ignore[attr-defined]

    with pytest.raises(AssertionError, match="tasks"):
        run_clean(main())


@pytest.mark.skipif(sys.platform != "linux", reason="open sockets are listed on Linux alone")
def test_socket_left_behind_is_seen() -> None:
    left = []

    async def main() -> None:
        left.append(socket.socket())

    with pytest.raises(AssertionError, match="sockets"):
        run_clean(main())
    left[0].close()


@pytest.mark.skipif(sys.platform != "linux", reason="open sockets are listed on Linux alone")
def test_connections_are_not_counted_where_others_listen_in_this_process() -> None:
    left = []

    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def connect() -> None:
            left.append(socket.create_connection(listener.getsockname()))

        async def listen() -> None:
            left.append(socket.create_server(("127.0.0.1", 0)))

        async def open_one() -> None:
            left.append(socket.socket())

        run_clean(connect())
        with pytest.raises(AssertionError, match="sockets"):
            run_clean(open_one())
        with pytest.raises(AssertionError, match="sockets"):
            run_clean(listen())
    for each in left:
        each.close()


def test_timer_left_behind_is_seen() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(60, print)

    with pytest.raises(AssertionError, match="timers"):
        run_clean(main(), loop_factory=asyncio.new_event_loop)


def test_failed_callback_is_seen() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_clean(main())
