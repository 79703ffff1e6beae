"""The client's own low-rank matrices on servers: sent where they are needed, and again when they have changed.

A server holds them as long as a stream lasts. Requests name the values that they want by a hash, so a server that has
none or others says so, and is sent them; failover needs nothing else.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from petals_client.adaptation import Adaptation, TunedValues, whole_name
from petals_core.announcement import SignedAnnouncement
from petals_core.errors import PetalsError, ProtocolError, TuningExpiredError
from petals_core.identity import PeerId
from petals_core.net.stream import Stream
from petals_core.tensors.codec import encode
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Message, OpenTuning, TuningReady, UpdateTuning

if TYPE_CHECKING:
    from petals_client.swarm import Swarm

T = TypeVar("T")
_MAX_HELD: Final = 256
"""Sessions that are kept open; that of the server which was not used for longest ends first."""
_MAX_SENDINGS: Final = 3
"""Times that values are sent for one request: others may take their place between sending and use."""


@dataclass(slots=True, eq=False)
class _Held:
    stream: Stream | None = None
    values_id: bytes = b""
    span: tuple[int, int] = (0, 0)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class TuningSessions:
    """All sessions of one swarm's client. Belongs to one event loop."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._held: OrderedDict[tuple[PeerId, object], _Held] = OrderedDict()

    async def request(
        self,
        server: SignedAnnouncement,
        start: int,
        end: int,
        adaptation: Adaptation | None,
        use: Callable[[dict[str, Any]], Awaitable[T]],
    ) -> T:
        """Make a request for blocks ``start:end`` that are changed; ``use`` is given the fields that say how.

        Raises:
            PetalsError: what ``use`` raises, or the server does not take the values.
        """
        fields: dict[str, Any] = {}
        if adaptation is not None and adaptation.adapter is not None:
            fields["active_adapter"] = whole_name(adaptation.adapter, server)
        tuned = None if adaptation is None else adaptation.tuned
        if tuned is None or not tuned.layout.part(start, end).num_values:
            return await use(fields)
        fields["tuning"] = tuned.values_id
        for _ in range(_MAX_SENDINGS - 1):
            await self._hold(server, tuned)
            try:
                return await use(fields)
            except TuningExpiredError:
                self._end(self._held.pop((server.peer_id, tuned.owner), None))
        await self._hold(server, tuned)
        return await use(fields)

    async def _hold(self, server: SignedAnnouncement, tuned: TunedValues) -> None:
        """See that a server holds values for its blocks."""
        key = (server.peer_id, tuned.owner)
        held = self._held.setdefault(key, _Held())
        self._held.move_to_end(key)
        if len(self._held) > _MAX_HELD:
            self._end(self._held.popitem(last=False)[1])
        span = (server.announcement.start, server.announcement.end)
        async with held.lock:
            if held.stream is not None and (held.values_id, held.span) == (tuned.values_id, span):
                return
            if held.stream is not None and held.span == span:
                try:
                    await self._send(held, tuned, held.stream)
                except PetalsError:  # the connection or the session has ended meanwhile
                    self._end(held)
                else:
                    return
            self._end(held)
            connection = await self._swarm.connect(server)
            stream = connection.open_stream(Priority.BULK)
            held.span = span
            try:
                await self._send(held, tuned, stream)
            except BaseException:
                stream.cancel()
                raise
            held.stream = stream

    async def _send(self, held: _Held, tuned: TunedValues, stream: Stream) -> None:
        start, end = held.span
        layout = tuned.layout
        timeout_s = self._swarm.options.step_timeout_s
        spec, payload = encode(tuned.values[layout.place(start, end)])
        common: dict[str, Any] = {
            "values_id": tuned.values_id,
            "tensors": (spec.to_wire(),),
            "deadline_ms": int(timeout_s * 1000),
        }
        request: OpenTuning | UpdateTuning
        if held.stream is None:
            request = OpenTuning(
                fingerprint=self._swarm.fingerprint,
                start=start,
                end=end,
                layers=layout.layers,
                rank=layout.rank,
                scaling=layout.scaling,
                **common,
            )
        else:
            request = UpdateTuning(**common)
        await stream.send(request, payload, timeout_s=timeout_s)
        reply: Message = await stream.receive(timeout_s=timeout_s)
        if not isinstance(reply.body, TuningReady) or reply.body.values_id != tuned.values_id:
            raise ProtocolError(f"the server answered with {type(reply.body).__name__} to values of an adapter")
        held.values_id = tuned.values_id

    def _end(self, held: _Held | None) -> None:
        if held is not None and held.stream is not None:
            held.stream.cancel()
            held.stream = None

    def close(self) -> None:
        """Let the servers forget all values; never blocks."""
        for held in self._held.values():
            self._end(held)
        self._held.clear()
