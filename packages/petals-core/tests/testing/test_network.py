"""The check that a test leaves nothing behind sees what is left, and only that."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from petals_core.testing.network import run_clean


@pytest.fixture
def kept() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def _open(kept: ExitStack, listener: socket.socket | None = None) -> None:
    if listener is None:
        kept.enter_context(socket.create_server(("127.0.0.1", 0)))
    else:
        kept.enter_context(socket.create_connection(listener.getsockname()))


def test_a_socket_that_stays_open_is_told(kept: ExitStack) -> None:
    with pytest.raises(AssertionError, match="sockets are left behind"):
        run_clean(_open(kept))


def test_where_others_listen_in_this_process_their_connections_are_not_counted(kept: ExitStack) -> None:
    listener = kept.enter_context(socket.create_server(("127.0.0.1", 0)))
    run_clean(_open(kept, listener))
    with pytest.raises(AssertionError, match="sockets are left behind"):
        run_clean(_open(kept))
