"""Both event loops that Petals runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from petals_core.net.loop import new_event_loop
from petals_core.testing.network import run_clean

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[asyncio.new_event_loop, new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine, and assert that it leaves no task, timer or socket behind."""
    return partial(run_clean, loop_factory=request.param)
