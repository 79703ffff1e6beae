"""Background tasks that have an owner: none is forgotten, and none outlives the owner's ``close``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

_logger = logging.getLogger(__name__)
T = TypeVar("T")


class BackgroundTasks:
    """Tasks of one owner, which run independently: the failure of one hurts no other.

    (``asyncio.TaskGroup`` ties its tasks to one block of code and to each other; connections and streams come and go.)
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Run ``coroutine`` as a task that ``close`` will cancel. What it raises and nobody awaits is logged."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def __len__(self) -> int:
        return len(self._tasks)

    async def join(self, timeout_s: float) -> bool:
        """Wait until all tasks that run now have ended, for at most ``timeout_s``; tell whether they have."""
        waiting = self._tasks - {asyncio.current_task()}
        return not waiting or not (await asyncio.wait(waiting, timeout=timeout_s))[1]

    async def close(self) -> None:
        """Cancel all tasks but the caller's own, and wait until they have ended."""
        current = asyncio.current_task()
        while waiting := self._tasks - {current}:
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.debug("background task %s ended with %r", task.get_name(), error)
