"""Whether the machine's owner uses it, from how much others take of the device."""

from __future__ import annotations

from typing import Final

BUSY_SHARE: Final = 0.4
"""Others take so much of the device: the owner works or plays."""
IDLE_SHARE: Final = 0.15
BUSY_AFTER_S: Final = 10.0
IDLE_AFTER_S: Final = 60.0
"""A pause between two games, or two renderings, is no invitation."""


class Busyness:
    """Turns measurements into a state that does not flicker: busy soon, idle only after a while."""

    def __init__(self) -> None:
        self.is_busy = False
        self._other_since_s: float | None = None
        """Since when measurements have spoken against the present state."""

    def note(self, others_share: float, *, now_s: float) -> bool:
        """Note what others take of the device, 0 to 1, at a monotonic time; returns whether the owner is busy."""
        speaks_against = others_share <= IDLE_SHARE if self.is_busy else others_share >= BUSY_SHARE
        if not speaks_against:
            self._other_since_s = None
            return self.is_busy
        if self._other_since_s is None:
            self._other_since_s = now_s
        if now_s - self._other_since_s >= (IDLE_AFTER_S if self.is_busy else BUSY_AFTER_S):
            self.is_busy = not self.is_busy
            self._other_since_s = None
        return self.is_busy


def parse_gpu_use(text: str, own_pids: set[int]) -> float:
    """What others take of a GPU, 0 to 1, of the output of ``nvidia-smi pmon -c 1 -s u``.

    A line is: GPU, process id, type, percent of the multiprocessors, and more; ``-`` where nothing was measured.
    """
    total = 0.0
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 4 or line.lstrip().startswith("#") or not fields[1].isdecimal():
            continue
        if int(fields[1]) not in own_pids and fields[3].isdecimal():
            total += int(fields[3]) / 100
    return min(1.0, total)
