"""A session as a link of a chain: its steps run one after another in a task of its own, whoever sends them.

What comes of them is kept for a while, so that a server that takes the place of the next one can be brought to where
that was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from petals_core.errors import (
    CacheLostError,
    DeadlineExceededError,
    InvalidRequestError,
    OutputsGoneError,
    PetalsError,
    RemoteFailureError,
)
from petals_core.identity import PeerId
from petals_core.limits import MAX_JOINED_TOKENS
from petals_core.net.stream import Stream
from petals_core.steps import continues, merge, straighten
from petals_core.tensors.states import States, join_states, select_rows
from petals_core.wire.messages import Message, Progress, Replay, Route, Step
from petals_server.ring.arrivals import Arrival, Arrivals, WaitingReplay
from petals_server.ring.kept_outputs import KeptOutputs
from petals_server.ring.next_hops import NextHops
from petals_server.ring.outlet import Outlet

log = logging.getLogger(__name__)

_MAX_WAIT_S: Final = 1.0
"""For all steps that are said to come and are joined: each may be slow, as the first one of a server is, and who says
so may send them one by one, so that this server looks slow."""


@dataclass(frozen=True, slots=True)
class Received:
    """A step that has arrived."""

    step: Step
    message: Message
    """In which it came, with its payload."""
    arrived_s: float
    """``time.monotonic`` then."""

    @property
    def deadline_s(self) -> float:
        """On the same clock."""
        return self.arrived_s + self.step.deadline_ms / 1000


StepHandler = Callable[["RingSession", Sequence[Received]], Awaitable[None]]
"""Computes a step, or at once several that may be joined, and delivers what comes of each."""


class RingSession:
    """One session: the steps that come, the outputs that go, and what it has kept. Belongs to one event loop."""

    def __init__(
        self,
        stream: Stream,
        *,
        next_hops: NextHops,
        outputs: KeptOutputs,
        has_cache: bool,
        route_timeout_s: float,
    ) -> None:
        """
        Args:
            stream: the client's.
            has_cache: whether steps append to a cache. Only then are they joined, and their outputs kept.
        """
        self.applied = -1
        """Number of the last step that was computed and delivered."""
        self._stream = stream
        self._arrivals = Arrivals(stream)
        self._outlet = Outlet(next_hops, stream)
        self._outputs = outputs
        self._kept = outputs.open()
        self._has_cache = has_cache
        self._route_timeout_s = route_timeout_s
        self._failed_attempt = -1
        self._computed = 1, 0.0
        """Tokens of the last step, and the seconds that it took."""
        self._worked_s = time.monotonic()
        """When a step was last done."""
        self._routing = asyncio.Lock()

    @property
    def client(self) -> PeerId:
        """Whose session it is."""
        return self._stream.peer_id

    @property
    def _idle_s(self) -> float:
        return time.monotonic() - max(self._worked_s, self._arrivals.active_s)

    async def run(self, handle: StepHandler, *, max_idle_s: float) -> None:
        """Take and compute steps until the client ends or gives up its stream.

        Raises:
            CacheLostError: nothing has happened for ``max_idle_s``.
            PetalsError: a step failed in a way that leaves nothing to go on with, or the client is gone.
        """
        worker = asyncio.create_task(self._work(handle))
        self._arrivals.listen()
        try:
            while True:
                try:
                    await self._stream.receive(timeout_s=max(0.0, max_idle_s - self._idle_s))
                except DeadlineExceededError:
                    if self._stream.error is not None:
                        raise  # of a step that was cut short, which ended the session
                    if self._idle_s < max_idle_s:
                        continue  # the server before has sent something meanwhile
                    raise CacheLostError(
                        f"the session was idle for {max_idle_s:.0f} s and is closed: open a new one"
                    ) from None
        finally:
            worker.cancel()
            await asyncio.wait([worker])
            self._outlet.close()
            self._arrivals.close()

    def end(self, error: PetalsError) -> None:
        """Give the session up, and tell its client why."""
        self._stream.cancel(error)

    def forget(self) -> None:
        """The session is over: what it has kept is dropped, and who waits for a replay is told."""
        self._arrivals.fail_replays()
        self._outputs.close(self._kept)

    # --- computing ----------------------------------------------------------------------------------------------------

    async def _work(self, handle: StepHandler) -> None:
        """Do what arrives, one after another; an error that is nobody's request's ends the session."""
        try:
            while True:
                item = await self._arrivals.take()
                if isinstance(item, Arrival):
                    await self._do(handle, item)
                else:
                    await self._replay(item)
        except Exception:
            log.exception("a session of peer %s failed", self.client)
            self.end(RemoteFailureError("internal error of the server"))

    async def _do(self, handle: StepHandler, arrival: Arrival) -> None:
        step = await self._read(arrival)
        if step is None or step.attempt < self._arrivals.attempt or step.attempt == self._failed_attempt:
            return
        steps = [Received(step, arrival.event.message, arrival.arrived_s)]
        if self._has_cache:
            await self._join(steps, arrival.stream)
            if step.attempt < self._arrivals.attempt:
                return
        try:
            await handle(self, steps)
        except PetalsError as error:
            await self._fail(error, step.attempt)
        self._worked_s = time.monotonic()

    async def _join(self, steps: list[Received], stream: Stream) -> None:
        """Take what is to be done next as well, as long as it came the same way and may be joined with these steps.

        For one that is said to come, of which it expects to be as large as the last of these, it waits no longer than
        computing that would take: nothing is won where they come more slowly.
        """
        num_tokens = max(1, sum(steps[0].step.row_tokens))
        ends_s = time.monotonic() + _MAX_WAIT_S
        while True:
            last = steps[-1].step
            num_last = sum(last.row_tokens)
            if last.is_followed and num_tokens + num_last <= (last.join_tokens or MAX_JOINED_TOKENS):
                await self._arrivals.wait(min(self._least_s(num_last), ends_s - time.monotonic()))
            arrival = self._arrivals.next()
            if arrival is None or arrival.stream is not stream:
                return
            message = arrival.event.message
            step = message.body
            if not isinstance(step, Step) or step.attempt != last.attempt or not continues(step, last):
                return
            num_tokens += max(1, sum(step.row_tokens))
            if step.join_tokens is None or num_tokens > step.join_tokens:
                return
            await self._arrivals.take()
            steps.append(Received(step, message, arrival.arrived_s))

    def _least_s(self, num_tokens: int) -> float:
        """Seconds that so many tokens take, as far as the last step tells: more than it had may take less each."""
        computed_tokens, computed_s = self._computed
        return computed_s * min(1.0, num_tokens / computed_tokens)

    async def _read(self, arrival: Arrival) -> Step | None:
        """The step that has arrived; None if it counts no more, or is something else."""
        stream = arrival.stream
        body = arrival.event.message.body
        if stream is not self._stream and stream is not self._arrivals.inlet:
            return None
        if isinstance(body, Step):
            return body
        error = InvalidRequestError(f"a session takes steps, not {type(body).__name__}")
        if stream is self._arrivals.inlet:
            stream.cancel(error)
            return None
        with contextlib.suppress(PetalsError):  # the client is gone, which ends the session
            await stream.fail(error, end=False)
        return None

    async def _fail(self, error: PetalsError, attempt: int) -> None:
        """Tell the client that a step failed; what follows it in the same attempt makes no sense any more."""
        self._failed_attempt = attempt
        error.attempt = attempt
        with contextlib.suppress(PetalsError):  # the client is gone, which ends the session
            await self._stream.fail(error, end=False)

    async def deliver(
        self,
        step: Step,
        output: States,
        *,
        queue_us: int,
        compute_us: int,
        deadline_s: float,
        is_followed: bool = False,
    ) -> None:
        """Send a step's output where it belongs, and keep it where it may be needed again; see :meth:`Outlet.send`.

        Raises:
            PetalsError: the client or the next server is gone.
        """
        self.applied = step.step
        self._computed = max(1, sum(step.row_tokens)), compute_us / 1e6
        self._arrivals.note_computed(step)
        is_to_be_kept = self._has_cache and not self._outlet.is_last
        try:
            if step.attempt >= self._arrivals.attempt:  # else the client has begun anew, and sends it again
                await self._outlet.send(
                    step,
                    output,
                    queue_us=queue_us,
                    compute_us=compute_us,
                    deadline_s=deadline_s,
                    is_followed=is_followed,
                )
        finally:
            if is_to_be_kept:
                self._outputs.keep(self._kept, step, output)

    def progress(self) -> Progress:
        """How far it is."""
        return self._arrivals.progress()

    # --- rebuilding others --------------------------------------------------------------------------------------------

    async def replay(self, request: Replay) -> int | None:
        """Send kept outputs once more, behind what is under way; returns the number of the last one.

        Raises:
            OutputsGoneError: they were not kept.
            NextHopError: the next server can't be reached.
            NoSessionError: the session has ended meanwhile.
            DeadlineExceededError: its turn did not come in time.
            OverloadedError: too many wait for theirs.
        """
        last = self._arrivals.add_replay(request)
        try:
            async with asyncio.timeout(request.deadline_ms / 1000):
                return await last
        except TimeoutError:
            raise DeadlineExceededError("the session's steps before the replay were not done in time") from None
        finally:
            self._arrivals.drop_replay(last)

    async def _replay(self, waiting: WaitingReplay) -> None:
        """Answer before sending: to send takes as long as the next server takes to compute."""
        request, last = waiting.request, waiting.last
        if last.done():
            return  # nobody waits for it any more
        try:
            steps = None
            if self._kept.is_complete and request.attempt == self._arrivals.attempt:
                steps = straighten(self._kept.before(request.before), select_rows)
            if steps is None:
                raise OutputsGoneError("the outputs of this session were not kept: replay what comes before")
            last.set_result(steps[-1][0] if steps else None)
            deadline_s = time.monotonic() + request.deadline_ms / 1000
            for number, each, states in merge(steps, join_states, request.max_tokens):
                if request.attempt < self._arrivals.attempt:
                    return
                step = Step(
                    step=number,
                    keep=each.keep,
                    row_tokens=each.row_tokens,
                    position_runs=each.position_runs,
                    tensors=(states.spec.to_wire(),),
                    deadline_ms=max(1, int(1000 * (deadline_s - time.monotonic()))),
                    attempt=request.attempt,
                    passes=request.passes,
                )
                await self._outlet.pass_on(step, states)
        except PetalsError as error:
            if last.done():
                await self._fail(error, request.attempt)
            else:
                last.set_exception(error)

    # --- its place in the chain ---------------------------------------------------------------------------------------

    async def route(self, request: Route) -> None:
        """Take another place in the chain.

        Raises:
            NextHopError: the next server can't be reached, or does not take steps from here.
        """
        async with self._routing:
            self._arrivals.begin_attempt(request.attempt)
            self._outlet.is_last = request.is_last
            self._arrivals.expect(None if request.previous is None else PeerId(request.previous))
            await self._outlet.lead(request)

    async def follow(self, stream: Stream) -> None:
        """Take steps from the server before, until its stream ends or the client chooses another one.

        Raises:
            NoSessionError: the client does not name it in time.
        """
        await self._arrivals.follow(stream, timeout_s=self._route_timeout_s)
