"""When weights may be brought into the form again that is faster for everybody but gradients."""

from __future__ import annotations

import math
from typing import Final

QUIET_S: Final = 60.0
"""So long nobody has wanted a gradient. Packing weights and back again takes as long as ten tokens do or so, a small
part of the device's time whatever clients do; and between two batches of somebody who trains pass seconds."""


class QuietTime:
    """How long nobody has wanted a gradient. Time is an argument throughout."""

    def __init__(self) -> None:
        self._num_wanted = 0
        self._since_s = -math.inf

    @property
    def is_wanted(self) -> bool:
        """Whether a gradient is waited for, or the forward that is kept for one."""
        return self._num_wanted > 0

    def begin(self) -> None:
        """Somebody wants a gradient."""
        self._num_wanted += 1

    def end(self, now_s: float) -> None:
        """It is there, or not wanted any more."""
        self._num_wanted -= 1
        self._since_s = now_s

    def left_s(self, now_s: float, *, num_graphs: int) -> float | None:
        """How long weights still have to stay as gradients need them; 0: they need not.

        None: until gradients that are wanted are there, and the ``num_graphs`` kept graphs are gone.
        """
        if self.is_wanted or num_graphs:
            return None
        return max(0.0, self._since_s + QUIET_S - now_s)
