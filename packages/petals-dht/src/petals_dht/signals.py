"""Ending a program when it is asked to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that is set by SIGINT and SIGTERM."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in signals:
            loop.add_signal_handler(number, stopped.set)
    except NotImplementedError:  # Windows: Ctrl-C arrives as KeyboardInterrupt.
        yield stopped
        return
    try:
        yield stopped
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
