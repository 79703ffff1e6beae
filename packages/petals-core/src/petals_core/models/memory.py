"""Memory that loading no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Collect what loading left behind and give freed heap pages back to the system.

    glibc keeps freed memory below its trim threshold (which grows up to 64 MiB as large blocks are freed), and torch
    frees many blocks of that size while weights are converted. ``malloc_trim`` is glibc's; elsewhere nothing is done.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
