"""How the time of a run is shared among what it measures. Time is an argument."""

from __future__ import annotations

from dataclasses import dataclass

SWARM_S, WORKER_S = 9.0, 4.0
"""Roughly, to start the servers of a mode and, two at a time, a client."""


@dataclass(slots=True, kw_only=True)
class Budget:
    """What is left of the time, and who gets how much of it."""

    end_s: float
    """When the time is over that cells share."""
    last_s: float
    """When nothing more is begun."""
    weight_left: float
    """Of cells that have not begun."""
    num_cells: int
    swarms_left: int
    workers_left: int
    """To be started; the time for it is set aside."""
    num_begun: int = 0

    def is_late(self, now_s: float) -> bool:
        """Whether nothing more may be begun."""
        return now_s >= self.last_s

    def limit_s(self, now_s: float, most_s: float) -> float:
        """So long may something take that is begun now."""
        return max(1.0, min(most_s, self.last_s - now_s))

    def begin(self, weight: float, now_s: float) -> float:
        """Take a cell of that weight from those that are left; returns its share in seconds."""
        starting_s = SWARM_S * self.swarms_left + WORKER_S * self.workers_left
        share_s = max(0.0, self.end_s - now_s - starting_s) * weight / self.weight_left
        self.weight_left -= weight
        self.num_begun += 1
        return share_s

    def progress(self, now_s: float) -> str:
        """For whoever waits: where the run is."""
        minutes = max(0.0, self.end_s - now_s) / 60
        return f"cell {self.num_begun} of {self.num_cells}, about {minutes:.0f} min left"
