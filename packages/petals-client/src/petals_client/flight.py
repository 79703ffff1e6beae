"""The parts of one step on their way through a chain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from petals_client.window import FlightWindow
from petals_core.steps import StepRequest
from petals_core.tensors.states import States
from petals_core.wire.frames import MAX_DECODE_TOKENS


class InterruptedFlight(Exception):  # noqa: N818 -- nobody's fault is told by it
    """Something has happened to the chain: what is under way will not arrive."""


class Flight:
    """Which parts of a step have come back, and the signal for who waits for them. Belongs to one event loop."""

    def __init__(self, parts: Sequence[tuple[StepRequest, States]], *, first_number: int, num_hops: int) -> None:
        self.parts = parts
        self.first_number = first_number
        self.started_s = time.perf_counter()  # uvloop's clock counts milliseconds
        self.results: list[States | None] = []
        """Of the parts that have come back; None for those without states."""
        self.window = FlightWindow(
            num_hops,
            part_tokens=max(states.spec.shape[0] for _, states in parts),
            join_tokens=max(request.join_tokens or 1 for request, _ in parts),
        )
        self.news_s = time.perf_counter()
        """When the last part came back, or the first was sent."""
        self.is_decode = len(parts) == 1 and parts[0][1].spec.shape[0] <= MAX_DECODE_TOKENS
        self.num_begun = 0
        """How often parts were to be sent."""
        self._sent_s: dict[int, float] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._on_news: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        self._is_interrupted = False

    @property
    def next_number(self) -> int:
        """Of the first part that has not come back."""
        return self.first_number + len(self.results)

    @property
    def next_request(self) -> StepRequest:
        """What that part asks for."""
        return self.parts[len(self.results)][0]

    @property
    def states(self) -> list[States]:
        """Of the parts that have come back, those with states."""
        return [states for states in self.results if states is not None]

    @property
    def is_done(self) -> bool:
        return len(self.results) == len(self.parts)

    def begin(self) -> None:
        """All parts that have not come back are to be sent, once more if they were."""
        self.num_begun += 1
        self._is_interrupted = False
        self._sent_s.clear()
        self.window.begin_again()
        self.news_s = time.perf_counter()

    def sent(self, number: int) -> None:
        """A part was sent."""
        self._sent_s[number] = time.perf_counter()
        self.window.sent(self.parts[number - self.first_number][1].spec.shape[0])

    def is_silent(self, number: int) -> bool:
        """Whether a part comes back without states."""
        index = number - self.first_number
        return 0 <= index < len(self.parts) and self.parts[index][0].wanted == 0

    def arrived(self, states: States | None) -> float:
        """The next part came back; returns the time of its trip."""
        now_s = time.perf_counter()
        trip_s = now_s - self._sent_s.pop(self.next_number, self.news_s)
        num_tokens = self.parts[len(self.results)][1].spec.shape[0]
        self.results.append(states)
        self.window.done(num_tokens=num_tokens, trip_s=trip_s, now_s=now_s)
        self.news_s = now_s
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        if self.is_done:
            self._wake()
        return trip_s

    def find(self, number: int) -> tuple[StepRequest, States] | None:
        """A part that has not come back; None: no such part."""
        index = number - self.first_number
        return self.parts[index] if len(self.results) <= index < len(self.parts) else None

    @property
    def is_interrupted(self) -> bool:
        """Whether what is under way will not arrive."""
        return self._is_interrupted

    def hand_on(self, on_news: Callable[[], None], timeout_s: float) -> None:
        """Call ``on_news`` once: when all parts are back, something has happened to the chain, or time is up."""
        self._on_news = on_news
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._wake)

    async def room(self) -> None:
        """Wait until another part may be sent."""
        while not self.window.has_room:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def end(self, timeout_s: float) -> bool:
        """Wait until all parts are back; False when nothing new has come for ``timeout_s``.

        Raises:
            InterruptedFlight: something has happened to the chain.
        """
        loop = asyncio.get_running_loop()
        called_s = time.perf_counter()
        while not self.is_done:
            if self._is_interrupted:
                raise InterruptedFlight
            left_s = max(self.news_s, called_s) + timeout_s - time.perf_counter()
            if left_s <= 0:
                return False
            self._waiter = loop.create_future()
            timer = loop.call_later(left_s, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        return True

    def interrupt(self) -> None:
        """Let who waits go on with ``InterruptedFlight``."""
        self._is_interrupted = True
        self._wake()

    def _wake(self) -> None:
        on_news, self._on_news = self._on_news, None
        if on_news is not None:
            assert self._timer is not None
            on_news()
            self._timer.cancel()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
