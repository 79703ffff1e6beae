"""Memory that loading no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable
from typing import Final

_TRIM_AFTER_BYTES: Final = 4 << 20


def release_memory() -> None:
    """Collect what loading left behind and give freed heap pages back to the system."""
    gc.collect()
    _trim_heap()


class HeapTrimmer:
    """Keeps the allocator from holding more than some MiB beside what is in use, while many tensors come and go.

    glibc gives large blocks back when they are freed, but learns from each (up to 32 MiB) and takes the next ones of
    that size from its heap. There it keeps what lies below something in use: of weights that are converted one by one,
    the gaps between the results may add up to the size of all sources.
    """

    __slots__ = ("_untrimmed_bytes",)

    def __init__(self) -> None:
        self._untrimmed_bytes = 0

    def note(self, num_bytes: int) -> None:
        """Temporary tensors of so many bytes were allocated, and are freed or soon will be."""
        self._untrimmed_bytes += num_bytes
        if self._untrimmed_bytes >= _TRIM_AFTER_BYTES:
            self._untrimmed_bytes = 0
            _trim_heap()


def _trim_heap() -> None:
    """Give freed pages back, also those between pages in use. glibc's; elsewhere nothing is done."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
