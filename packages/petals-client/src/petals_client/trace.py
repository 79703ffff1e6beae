"""Where the time of a step went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from petals_core.identity import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTrace:
    """One server's part of a step."""

    peer_id: PeerId
    start: int
    end: int
    total_s: float
    """Between handing the request to the connection and having the whole reply."""
    queue_s: float
    """The server's claim: how long the request waited for its turn."""
    compute_s: float
    """The server's claim: how long it computed."""

    @property
    def network_s(self) -> float:
        """What is left: both ways, and the software on both sides."""
        return max(0.0, self.total_s - self.queue_s - self.compute_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """One step of a session through its chain."""

    num_tokens: int
    total_s: float
    """As the model saw it, thread changes included."""
    hops: tuple[HopTrace, ...]


def format_trace(steps: Sequence[StepTrace]) -> str:
    """Sum up steps as a small table: mean milliseconds per step and hop."""
    if not steps:
        return "no steps yet"
    count = len(steps)
    lines = [
        f"{count} steps, {sum(step.num_tokens for step in steps)} tokens, "
        f"{1000 * sum(step.total_s for step in steps) / count:.2f} ms a step"
    ]
    sums: dict[tuple[PeerId, int, int], list[float]] = {}
    for step in steps:
        for hop in step.hops:
            totals = sums.setdefault((hop.peer_id, hop.start, hop.end), [0.0, 0.0, 0.0, 0.0])
            totals[0] += 1
            totals[1] += hop.network_s
            totals[2] += hop.queue_s
            totals[3] += hop.compute_s
    for (peer_id, start, end), (visits, network, queue, compute) in sums.items():
        lines.append(
            f"  {peer_id.short}  blocks {start}:{end}  network {1000 * network / visits:.2f} ms  "
            f"queue {1000 * queue / visits:.2f} ms  compute {1000 * compute / visits:.2f} ms"
        )
    return "\n".join(lines)
