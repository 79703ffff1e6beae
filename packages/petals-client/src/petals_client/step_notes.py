"""What the steps of a session teach: where their time went, and how fast and how reliable its servers are."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from petals_client.session import HopSession
from petals_client.swarm import Swarm
from petals_client.trace import HopTrace, StepTrace, trace_trip
from petals_core.identity import PeerId
from petals_core.observation import unexplained_s

_MAX_TRACES: Final = 1024


@dataclass(frozen=True, slots=True)
class _Trip:
    """A part of a step that has come back."""

    hops: tuple[HopSession, ...]
    timings: Sequence[tuple[int, int, int]]
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _DoneStep:
    """A step that is over, and was not noted yet."""

    trips: list[_Trip]
    hops: tuple[HopSession, ...]
    num_tokens: int
    last_tokens: int
    """Of its last part."""
    is_decode: bool
    total_s: float


class StepNotes:
    """Notes of one session. Belongs to its event loop.

    A step is noted when the next one is on its way, or the session ends: before, somebody waits for its result.
    """

    def __init__(self, swarm: Swarm) -> None:
        self.traces: deque[StepTrace] = deque(maxlen=_MAX_TRACES)
        """Of the last steps that were noted."""
        self._swarm = swarm
        self._trips: list[_Trip] = []
        self._last: _DoneStep | None = None

    def end_trip(self, hops: Sequence[HopSession], timings: Sequence[tuple[int, int, int]], *, total_s: float) -> None:
        """A part of the step is back; ``timings`` are the servers' own, see ``trace_trip``."""
        self._trips.append(_Trip(tuple(hops), timings, total_s))

    def end_step(
        self, hops: Sequence[HopSession], *, part_tokens: Sequence[int], is_decode: bool, total_s: float
    ) -> None:
        """All parts are back."""
        self._last = _DoneStep(
            trips=self._trips,
            hops=tuple(hops),
            num_tokens=sum(part_tokens),
            last_tokens=part_tokens[-1],
            is_decode=is_decode,
            total_s=total_s,
        )
        self._trips = []

    def write(self) -> None:
        """Note the step that has ended, if that was not done."""
        step, self._last = self._last, None
        if step is None:
            return
        traces: list[HopTrace] = []
        for trip in step.trips:
            traces += trace_trip(
                [session.hop for session in trip.hops],
                trip.timings,
                round_trips_s=[session.connection.rtt_s for session in trip.hops],
                carried=[False, *(session.is_cut_off for session in trip.hops[:-1])],
                total_s=trip.total_s,
            )
        self.traces.append(StepTrace(num_tokens=step.num_tokens, total_s=step.total_s, hops=tuple(traces)))
        self._praise(step, {trace.peer_id: trace for trace in traces[-len(step.hops) :]})

    def _praise(self, step: _DoneStep, last: dict[PeerId, HopTrace]) -> None:
        """Tell that all servers have done a step, and what they said of its last part."""
        lost_s = unexplained_s(
            network_s=sum(trace.network_s for trace in last.values()),
            round_trips_s=sum(session.connection.rtt_s for session in step.hops),
        )
        swarm = self._swarm
        for session in step.hops:
            server, hop, trace = session.server, session.hop, last.get(session.hop.peer_id)
            took_s = 0.0 if trace is None else trace.queue_s + trace.compute_s
            swarm.praise_work(server, hop, num_tokens=step.last_tokens, took_s=took_s)
            if step.is_decode and trace is not None:
                swarm.observe(server, hop, num_tokens=step.last_tokens, took_s=took_s + lost_s)
            swarm.contribution.note(server, hop, step.num_tokens)
