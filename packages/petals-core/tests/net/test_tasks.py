"""Background tasks end with their owner."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from petals_core.net.tasks import BackgroundTasks
from petals_core.testing.network import run_clean


def test_close_cancels_and_waits() -> None:
    ended: list[int] = []

    async def stubborn(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            ended.append(number)

    async def main() -> None:
        tasks = BackgroundTasks()
        for number in range(3):
            tasks.start(stubborn(number))
        await asyncio.sleep(0)
        assert len(tasks) == 3
        assert not await tasks.join(0)
        await tasks.close()
        assert len(tasks) == 0
        assert await tasks.join(0)

    run_clean(main())
    assert sorted(ended) == [0, 1, 2]


def test_task_may_close_its_own_group() -> None:
    async def main() -> None:
        tasks = BackgroundTasks()
        task = tasks.start(tasks.close())
        await task
        assert not task.cancelled()

    run_clean(main())


def test_failure_of_one_hurts_no_other() -> None:
    async def failing() -> None:
        raise ValueError("broken")

    async def main() -> None:
        tasks = BackgroundTasks()
        bad, good = tasks.start(failing()), tasks.start(asyncio.sleep(0, "fine"))
        with pytest.raises(ValueError, match="broken"):
            await bad
        assert await good == "fine"

    run_clean(main())
