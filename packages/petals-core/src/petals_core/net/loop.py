"""The event loop that Petals runs on: uvloop where it exists, asyncio's own elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

try:
    import uvloop
except ImportError:  # Windows, PyPy
    uvloop = None  # type: ignore[assignment]

T = TypeVar("T")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Make an event loop of the quickest kind there is. It belongs to the caller, who closes it."""
    return asyncio.new_event_loop() if uvloop is None else uvloop.new_event_loop()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end on a new loop, cancel what is left, close the loop: ``asyncio.run`` with our loop."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
