"""Whose turn on the device is next."""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import Final, Generic, TypeVar

MAX_DECODE_COLUMNS: Final = 16
"""A step that appends at most so many columns is a decode step, speculated tokens included."""
MAX_DECODE_TURNS: Final = 8
"""Decode turns in a row while bulk work waits: what keeps a prefill from starving under steady decoding."""

W = TypeVar("W")


class Urgency(IntEnum):
    """How soon work is wanted."""

    DECODE = 0
    """Somebody waits for the next token."""
    BULK = 1
    """Prefill and forward requests."""


class Backlog(Generic[W]):
    """Work that waits for the device: decode steps first, each kind in turn.

    Work that takes several turns goes back to the end of its queue after each, so that a short prompt needs not wait
    for all of a long one.
    """

    def __init__(self) -> None:
        self._queues: tuple[deque[W], deque[W]] = (deque(), deque())
        self._decode_turns = 0

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues)

    def push(self, work: W, urgency: Urgency) -> None:
        """Add work to the end of its queue."""
        self._queues[urgency].append(work)

    def pop(self) -> W | None:
        """Take the work whose turn it is, or None if there is none."""
        decode, bulk = self._queues
        if decode and (not bulk or self._decode_turns < MAX_DECODE_TURNS):
            self._decode_turns += 1
            return decode.popleft()
        self._decode_turns = 0
        return bulk.popleft() if bulk else None
