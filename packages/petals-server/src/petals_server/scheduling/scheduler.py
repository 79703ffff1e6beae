"""Turns waiting requests into plans. Prompt and decode step differ in their number of tokens alone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from petals_core.errors import PetalsError
from petals_server.scheduling.pace import Pace
from petals_server.scheduling.plan import Part, Plan
from petals_server.scheduling.request import Request, Urgency
from petals_server.scheduling.shares import Shares

MAX_TURNS_LEFT_OUT: Final = 8
"""A prompt or forward that could not join so many turns gets one, however many sessions decode."""
BLOCKED_RETRY_S: Final = 0.05
"""How soon requests that found no pages are looked at again, if nothing else happens before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """There is nothing to compute before ``until_s``, unless something arrives."""

    until_s: float | None
    """None: nothing at all is waiting."""


class Scheduler:
    """Requests that wait for the device or are on it. Not thread-safe: the engine has a lock."""

    def __init__(self, shares: Shares, pace: Pace) -> None:
        self.shares = shares
        self.pace = pace
        self._waiting: dict[Request, None] = {}
        self._left_out: dict[Request, int] = {}
        """Bulk work, and the turns that were others' since it was there."""
        self.failures: list[tuple[Request, PetalsError]] = []
        """Requests that could not begin and why; the owner empties it after each plan."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(self._waiting)

    def add(self, request: Request, now_s: float) -> None:
        """Take up a request."""
        self._waiting[request] = None
        if request.session is not None:
            self.pace.note_arrival(request.session, now_s)

    def remove(self, request: Request) -> None:
        """Forget a request, begun or not; idempotent."""
        self._waiting.pop(request, None)
        self._left_out.pop(request, None)

    def plan(self, now_s: float) -> Plan | Wait:
        """What the next turn computes.

        The request that goes first decides whether others can join it; those that decode join before prompts do, and
        prompts get as many tokens as the decoding sessions have patience for.
        """
        if not self._waiting:
            return Wait(until_s=None)
        until_s = self.pace.wait_until({request.session for request in self._waiting}, now_s)
        if until_s is not None:
            return Wait(until_s=until_s)
        parts: list[Part] = []
        ordered = self.shares.order(list(self._waiting), now_s)
        if self._left_out and len(ordered) > 1:
            starving = next((each for each in ordered if self._left_out.get(each, 0) >= MAX_TURNS_LEFT_OUT), None)
            if starving is not None:
                ordered.remove(starving)
                ordered.insert(0, starving)
        is_full = False
        for first in ordered:
            if first.key is None:
                count = min(first.num_tokens_left, first.max_turn_tokens)
                if first.urgency is not Urgency.DECODE:
                    count = min(count, self.pace.bulk_tokens(0, now_s, {first.session}))
                part = self._take(first, count, now_s)
                if part is not None:
                    return Plan(parts=(part,))
                continue
            alike = [request for request in ordered if request.key == first.key]
            num_decode = 0
            for request in alike:
                if request.urgency is Urgency.DECODE:
                    part = self._take(request, min(request.num_tokens_left, request.max_turn_tokens), now_s)
                    if part is not None:
                        parts.append(part)
                        num_decode += part.num_tokens
            bulk = [request for request in alike if request.urgency is not Urgency.DECODE]
            budget = self.pace.bulk_tokens(num_decode, now_s, {request.session for request in alike}) if bulk else 0
            for request in bulk:
                if budget > 0 and not is_full:
                    part = self._take(request, min(request.num_tokens_left, request.max_turn_tokens, budget), now_s)
                    if part is None:
                        is_full = request in self._waiting  # later prompts must not take the pages that it waits for
                        continue
                    parts.append(part)
                    budget -= part.num_tokens
            if parts:
                return Plan(parts=tuple(parts))
        return Wait(until_s=now_s + BLOCKED_RETRY_S if self._waiting else None)

    def absorb(self, plan: Plan, seconds: float, now_s: float) -> list[Request]:
        """Note that a plan was computed in that time; returns the requests that are complete by it.

        Requests that go alone are not: they say themselves when they are done, and are removed then.
        """
        done, decoded = [], []
        num_decode = num_bulk = 0
        for part in plan.parts:
            request = part.request
            request.compute_s += seconds
            if request.key is not None:
                if request.urgency is Urgency.DECODE:
                    num_decode += part.num_tokens
                else:
                    num_bulk += part.num_tokens
                if request in self._waiting:
                    request.num_done += part.num_tokens
                    request.passed(part.rows)
                    if not request.num_tokens_left:
                        done.append(request)
                        if request.urgency is Urgency.DECODE and request.session is not None:
                            decoded.append(request.session)
            self.shares.charge(request, part.num_tokens)
        self.shares.charge_time(seconds, is_training=plan.parts[0].request.urgency is Urgency.TRAINING)
        self._note_left_out(plan)
        if num_decode or num_bulk:
            self.pace.note_turn(num_decode=num_decode, num_bulk=num_bulk, seconds=seconds, decoded=decoded, now_s=now_s)
        for request in done:
            self.remove(request)
        return done

    def note_alone(self, session: object, peer_id: Hashable, *, started_s: float, ended_s: float) -> None:
        """Note that a session's next token was computed while nothing waited here, without a plan."""
        seconds = ended_s - started_s
        self.pace.note_arrival(session, started_s)
        self.shares.charge_alone(peer_id, 1, seconds, now_s=started_s)
        self.pace.note_turn(num_decode=1, num_bulk=0, seconds=seconds, decoded=(session,), now_s=ended_s)

    def _note_left_out(self, plan: Plan) -> None:
        served = {part.request for part in plan.parts}
        for request in self._waiting:
            if request.urgency is Urgency.BULK:
                self._left_out[request] = 0 if request in served else self._left_out.get(request, 0) + 1

    def _take(self, request: Request, count: int, now_s: float) -> Part | None:
        try:
            take = request.take(count)
        except PetalsError as error:
            self.remove(request)
            self.failures.append((request, error))
            return None
        request.is_blocked = take is None
        if take is None:
            return None
        if not request.is_begun:
            request.is_begun = True
            request.queue_s = now_s - request.arrived_s
        return Part(request=request, num_tokens=count, rows=take.rows, copies=take.copies)
