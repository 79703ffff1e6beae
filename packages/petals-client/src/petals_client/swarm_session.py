"""A session through a chain of servers: steps go around the ring, and on with others when a server fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.flight import Flight, InterruptedFlight
from petals_client.loop_thread import Caller
from petals_client.opening import ChainOpener
from petals_client.patience import Patience
from petals_client.recovery import Recovery
from petals_client.session import (
    BACKLOG_BYTES,
    PARTS_BACKLOG_BYTES,
    HopSession,
    States,
    is_of_request,
    make_step,
    read_states,
)
from petals_client.step_notes import StepNotes
from petals_client.swarm import Servers, Swarm
from petals_core.errors import InvalidRequestError, PeerConnectionError, PetalsError, ProtocolError
from petals_core.routing.graph import Chain, Hop
from petals_core.steps import StepHistory, StepRequest
from petals_core.tensors.codec import TensorSpec
from petals_core.wire.events import MessageReceived
from petals_core.wire.messages import Message, Step, StepResult, graph_id_of

_logger = logging.getLogger(__name__)


class SwarmSession:
    """The attention cache of one batch, spread over the servers of a chain. Belongs to one event loop."""

    def __init__(
        self,
        swarm: Swarm,
        *,
        start: int,
        end: int,
        num_rows: int,
        max_length: int,
        prompts: Tensor | None = None,
        adaptation: Adaptation | None = None,
        keeps_graphs: bool = False,
    ) -> None:
        """
        Args:
            prompts: [end - start, 1, P, H], deep prompts.
            keeps_graphs: whether steps are forwards whose graphs the servers keep (``graph_ids``). Such a session is
                over with its first failure, since nobody else can be given the graphs.
        """
        self.swarm = swarm
        self.start = start
        self.end = end
        self.hops: list[HopSession] = []
        self.opener = ChainOpener(
            swarm,
            start=start,
            num_rows=num_rows,
            max_length=max_length,
            prompts=prompts,
            adaptation=adaptation,
            keeps_graphs=keeps_graphs,
        )
        self._keeps_graphs = keeps_graphs
        self.history: StepHistory[States] = StepHistory(swarm.options.history_bytes)
        """What the first server was sent: from it everything can be rebuilt."""
        self.attempt = 0
        """Counts recoveries; what still comes of an earlier attempt is dropped."""
        self.is_closed = False
        self.patience = Patience()
        self.notes = StepNotes(swarm)
        self._next_number = 0
        self._flight: Flight | None = None
        self._back: tuple[Flight, StepResult, float, float] | None = None
        """A part that has come back and was not noted yet, when nothing had for how long, and the time of its trip."""
        self._carrying: set[asyncio.Task[None]] = set()
        self._recovery = Recovery(self)

    @property
    def chain(self) -> Chain:
        """The servers that serve it."""
        return tuple(session.hop for session in self.hops)

    @property
    def next_number(self) -> int:
        """Of the part that is sent next."""
        return self._next_number

    def graph_ids(self, number: int) -> list[tuple[Hop, bytes]]:
        """Under which name each server of the chain keeps the graph of a part."""
        return [(session.hop, graph_id_of(session.session_id, number)) for session in self.hops]

    @property
    def rate_bytes_per_s(self) -> float | None:
        """How fast the link to the first server takes bytes; None while nothing has had to wait."""
        return self.hops[0].connection.rate_bytes_per_s if self.hops else None

    @property
    def round_trip_s(self) -> float | None:
        """To the first server and back, as it was last measured."""
        return self.hops[0].connection.rtt_s if self.hops else None

    async def open(self, plan: tuple[Chain, Servers] | None = None) -> None:
        """Plan a chain, open the session on each of its servers, and let these find each other.

        A ``plan``, a chain and what all servers announced, is tried first.

        Where servers have gone that were there before, this waits for others up to ``recovery_timeout_s``. On failure
        nothing is left open.

        Raises:
            PetalsError: no chain could be opened.
        """
        deadline_s = asyncio.get_running_loop().time() + self.swarm.options.recovery_timeout_s
        self.hops = await self.opener.wait_and_open(
            self.start, self.end, failed=set(), deadline_s=deadline_s, is_urgent=False, plan=plan
        )
        try:
            for hop in self.hops:
                self.watch(hop)
            await self._recovery.connect()
        except BaseException:
            self.close()
            raise

    async def step(self, parts: Sequence[tuple[StepRequest, States]]) -> list[States]:
        """Run the parts of one step through the chain, one behind the other; return what is wanted of each.

        Of parts that want nothing the last server says no more than that they are done, and nothing is returned.
        When a server fails, others are brought to where it was and take its place.

        Raises:
            PetalsError: a server failed and could not be replaced. The session must then be closed.
        """
        return await self._finish(self._new_flight(parts))

    def begin_step(self, parts: Sequence[tuple[StepRequest, States]], caller: Caller[list[States]]) -> None:
        """``step`` for a caller in another thread. Where all goes well, one small part needs no task: it is sent here,
        and its caller goes on from where it comes back."""
        flight = self._new_flight(parts)
        if len(parts) > 1 or self.is_closed or self._recovery.is_needed():
            caller.go_on(self._finish(flight))
            return

        def on_news() -> None:
            if flight.is_done:
                caller.give(flight.states)
            else:
                caller.go_on(self._finish(flight, is_late=not flight.is_interrupted))

        hop, (request, states) = self.hops[0], parts[0]
        step = make_step(flight.first_number, request, states, self.attempt, self.swarm.options.step_timeout_s)
        flight.begin()
        flight.sent(flight.first_number)
        try:
            is_sent = hop.send_now(step, states.payload)
        except PetalsError as error:
            self._on_failure(hop, error)
            is_sent = False
        if not is_sent:
            caller.go_on(self._finish(flight))
            return
        self._flight = flight
        self.settle()
        flight.hand_on(on_news, self.patience.wait_s(is_decode=flight.is_decode))

    def _new_flight(self, parts: Sequence[tuple[StepRequest, States]]) -> Flight:
        flight = Flight(parts, first_number=self._next_number, num_hops=len(self.hops))
        self._next_number += len(parts)
        self._recovery.begin_step()
        return flight

    async def _finish(self, flight: Flight, *, is_late: bool = False) -> list[States]:
        """Bring a flight to its end; ``is_late``: it is under way, and nothing has come of it for long."""
        while not flight.is_done:
            if self.is_closed:
                raise InvalidRequestError("the session was closed while a step was under way")
            if self._recovery.is_needed():
                if self._keeps_graphs:
                    raise PeerConnectionError("a server of the chain has failed, and graphs with it")
                self._flight, is_late = None, False
                self.settle()
                await self._recovery.recover(flight)
            self._flight = flight
            try:
                await self._fly(flight, is_late=is_late)
            except InterruptedFlight:
                is_late = False
            finally:
                self._flight = None
        return flight.states

    def settle(self) -> None:
        """Note what has come back. For a decode step that is put off until the next one is on its way, or something
        happens: the thread that waits for its result can't go on while this one is busy."""
        back, self._back = self._back, None
        if back is not None:
            flight, result, wait_s, trip_s = back
            request, sent = flight.parts[result.step - flight.first_number]
            for hop in self.hops:
                hop.is_empty = False
            self.history.append(result.step, request, sent, sent.spec.num_bytes)
            self.patience.note(wait_s, is_decode=flight.is_decode)
            self.notes.end_trip(self.hops, result.hops or (), total_s=trip_s)
            if result.step == flight.first_number + len(flight.parts) - 1:
                self.notes.end_step(
                    self.hops,
                    part_tokens=[states.spec.shape[0] for _, states in flight.parts],
                    is_decode=flight.is_decode,
                    total_s=flight.news_s - flight.started_s,
                )
        self.notes.write()

    def close(self) -> None:
        """Free the caches on all servers; never blocks, idempotent."""
        self.is_closed = True
        self.settle()
        hops, self.hops = self.hops, []
        for session in hops:
            session.close()
        for task in self._carrying:
            task.cancel()
        if self._flight is not None:
            self._flight.interrupt()

    def watch(self, hop: HopSession) -> None:
        """Take what comes from a server."""
        hop.start(self._on_message, self._on_failure)

    # --- sending ------------------------------------------------------------------------------------------------------

    async def _fly(self, flight: Flight, *, is_late: bool) -> None:
        """Send the parts that are not back, unless they are under way and late, and wait for them.

        Raises:
            InterruptedFlight: something has happened to the chain.
        """
        sender: asyncio.Task[None] | None = None
        num_looks = 0
        try:
            if is_late:
                num_looks = 1
                await self._recovery.lookout.look(flight)
            else:
                sender = await self._begin(flight)
            while not await flight.end(self.patience.wait_s(is_decode=flight.is_decode, num_looks=num_looks)):
                num_looks += 1
                await self._recovery.lookout.look(flight)
        finally:
            if sender is not None:
                sender.cancel()

    async def _begin(self, flight: Flight) -> asyncio.Task[None] | None:
        """Send all parts that are not back, the task that this takes is returned."""
        sender: asyncio.Task[None] | None = None
        flight.begin()
        if len(flight.parts) == flight.num_begun == 1 and flight.parts[-1][1].spec.num_bytes <= BACKLOG_BYTES:
            # Nothing is queued before it, so this does not wait for a server that takes nothing.
            await self._send(flight, flight.next_number)
        else:
            sender = asyncio.create_task(self._send_all(flight))
        self.settle()
        return sender

    async def _send_all(self, flight: Flight) -> None:
        for number in range(flight.next_number, flight.first_number + len(flight.parts)):
            await flight.room()
            await self._send(flight, number)

    async def _send(self, flight: Flight, number: int) -> None:
        request, states = flight.parts[number - flight.first_number]
        flight.sent(number)
        timeout_s = self.swarm.options.step_timeout_s
        backlog_bytes = BACKLOG_BYTES if len(flight.parts) == 1 else PARTS_BACKLOG_BYTES
        step = make_step(number, request, states, self.attempt, timeout_s)
        await self.send(0, step, states, backlog_bytes=backlog_bytes)

    async def send(self, index: int, step: Step, states: States, *, backlog_bytes: int = BACKLOG_BYTES) -> None:
        """Send a step to a server of the chain; that it can't be is told as that server's failure."""
        hop = self.hops[index]
        try:
            await hop.send(step, states.payload, backlog_bytes=backlog_bytes)
        except PetalsError as error:
            self._on_failure(hop, error)

    # --- what comes from the servers ----------------------------------------------------------------------------------

    def _on_message(self, hop: HopSession, event: MessageReceived) -> None:
        message = event.message
        body = message.body
        if not isinstance(body, (Step, StepResult)):
            raise ProtocolError(f"the server sent {type(body).__name__} in a session")
        is_for_us = body.attempt == self.attempt and hop in self.hops
        if isinstance(body, Step) and is_for_us:
            index = self.hops.index(hop)
            if index + 1 >= len(self.hops):
                raise ProtocolError("the last server of the chain passed states on")
            states = self._read_carried(body, message)
            hop.handed_on = body.step
            # It sends more when the network has taken this.
            carrying = asyncio.create_task(self.send(index + 1, body, states))
            self._carrying.add(carrying)
            carrying.add_done_callback(lambda task: self._end_carrying(task, hop, event))
            return
        try:
            if is_for_us and isinstance(body, StepResult):
                self._take_result(hop, body, message)
        finally:
            hop.accept(event)  # last, for somebody may wait for what it brings

    def _take_result(self, hop: HopSession, body: StepResult, message: Message) -> None:
        flight = self._flight
        if not body.tensors and (flight is None or not flight.is_silent(body.step)):
            self._recovery.rebuilding.acknowledged(hop, body.step)
        elif hop is self.hops[-1] and flight is not None:
            self._take(flight, body, message)

    def _end_carrying(self, task: asyncio.Task[None], hop: HopSession, event: MessageReceived) -> None:
        self._carrying.discard(task)
        hop.accept(event)

    def _read_carried(self, step: Step, message: Message) -> States:
        """States that a server could not pass on itself; step and states are those of the part that it was sent."""
        if len(step.tensors) != 1:
            raise ProtocolError(f"the server passed on {len(step.tensors)} tensors instead of one")
        spec = TensorSpec.from_wire(step.tensors[0])
        flight = self._flight
        part = None if flight is None else flight.find(step.step)
        if part is not None:
            request, sent = part
            if not is_of_request(step, request):
                raise ProtocolError(f"the server passed step {step.step} on as another one than it was sent")
            spec = sent.spec
        return read_states(message, step.tensors, spec)

    def _take(self, flight: Flight, result: StepResult, message: Message) -> None:
        if result.step != flight.next_number:
            if flight.find(result.step) is not None:
                raise ProtocolError(f"the server answered step {result.step} before step {flight.next_number}")
            return  # again
        request, sent = flight.parts[result.step - flight.first_number]
        if result.tensors and request.wanted == 0:
            raise ProtocolError(f"the server answered step {result.step} with states that nobody wants")
        states = None
        if request.wanted != 0:
            states = read_states(message, result.tensors, sent.spec, sum(request.result_tokens))
        before_s = flight.news_s
        trip_s = flight.arrived(states)
        self._back = (flight, result, flight.news_s - before_s, trip_s)
        if flight.is_done:
            self._recovery.end_step()
            self._flight = None
        if not (flight.is_done and flight.is_decode):
            self.settle()

    def _on_failure(self, hop: HopSession, error: PetalsError) -> None:
        """A step has failed at a server, or the session with it is broken."""
        if hop not in self.hops or error.attempt not in (None, self.attempt):
            return
        self.settle()  # what went well before, first: a success behind a failure would clear it
        self._recovery.note(hop, error)
        if self._flight is not None:
            self._flight.interrupt()
