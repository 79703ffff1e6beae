"""The first of several attempts that succeeds, each with a short head start (after RFC 8305, "happy eyeballs")."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from petals_core.errors import PeerConnectionError, PetalsError

C = TypeVar("C")
T = TypeVar("T")


async def race(
    candidates: Sequence[C],
    attempt: Callable[[C], Coroutine[Any, Any, T]],
    *,
    head_start_s: float,
    discard: Callable[[T], None],
) -> T:
    """Return the first success of ``attempt(candidate)``.

    Candidates are tried in order; the next one starts when ``head_start_s`` has passed or one has failed. When one
    succeeds the others are cancelled, and a result that came too late goes to ``discard``. No task is left behind, also
    when the caller is cancelled.

    Raises:
        PetalsError: all failed. The only error, or the first one that says more than that no connection was made, or
            one ``PeerConnectionError`` with all texts.
    """
    waiting = list(reversed(candidates))
    running: set[asyncio.Task[T]] = set()
    finished: list[asyncio.Task[T]] = []
    errors: list[PetalsError] = []
    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.create_task(attempt(waiting.pop())))
            done, running = await asyncio.wait(
                running, timeout=head_start_s if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            finished.extend(done)
            for task in done:
                error = task.exception()
                if error is None:
                    finished.remove(task)
                    return task.result()
                if not isinstance(error, PetalsError):
                    raise error
                errors.append(error)
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        for task in [*finished, *running]:
            if not task.cancelled() and task.exception() is None:
                discard(task.result())
    raise _combined(errors)


def _combined(errors: list[PetalsError]) -> PetalsError:
    if len(errors) == 1:
        return errors[0]
    telling = [error for error in errors if not isinstance(error, PeerConnectionError)]
    if telling:
        return telling[0]
    return PeerConnectionError("; ".join(error.message for error in errors) or "there is no address to connect to")
