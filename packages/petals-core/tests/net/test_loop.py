"""The event loop that Petals runs on."""

from __future__ import annotations

import asyncio
import importlib.util

from petals_core.net.loop import run


def test_runs_on_uvloop_where_it_exists() -> None:
    async def kind() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run(kind()).startswith("uvloop") == (importlib.util.find_spec("uvloop") is not None)
