"""Sessions with one server, spoken in the wire protocol itself, so that one process can keep a server busy."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import torch

from petals_core.addresses import Address
from petals_core.identity import Identity
from petals_core.net.dialer import Dialer, PeerConnection
from petals_core.net.rpc import call
from petals_core.net.stream import Stream
from petals_core.tensors.codec import TensorSpec, decode, encode
from petals_core.wire.frames import Priority
from petals_core.wire.messages import SESSION_ID_BYTES, Info, InfoRequest, OpenSession, SessionOpened, Step, StepResult

STEP_TIMEOUT_S = 120.0


class Peer:
    """One client of one server: an identity and its connection."""

    def __init__(self, dialer: Dialer, connection: PeerConnection, info: Info) -> None:
        self.connection = connection
        self.server = info
        self._dialer = dialer

    @classmethod
    async def connect(cls, address: str) -> Peer:
        """A client of a new identity."""
        dialer = Dialer(identity=Identity.ephemeral(), connect_timeout_s=20.0)
        connection = await dialer.connect([Address.parse(address)], peer_id=None)
        return cls(dialer, connection, await ask(connection))

    async def info(self) -> Info:
        """What the server says of itself now."""
        return await ask(self.connection)

    async def open(self, *, max_length: int, deadline_s: float = 30.0) -> Session:
        """Open a session of one row; raises what the server answers."""
        stream = self.connection.open_stream(Priority.DECODE)
        request = OpenSession(
            session_id=os.urandom(SESSION_ID_BYTES),
            fingerprint=self.server.fingerprint,
            start=self.server.start,
            end=self.server.end,
            num_rows=1,
            max_length=max_length,
            deadline_ms=int(1000 * deadline_s),
        )
        await stream.send(request)
        reply = await stream.receive(timeout_s=deadline_s + 5.0)
        assert isinstance(reply.body, SessionOpened), reply.body
        return Session(stream)

    async def close(self) -> None:
        await self._dialer.close()


async def ask(connection: PeerConnection) -> Info:
    """What a server says of itself."""
    reply = await call(connection, InfoRequest(), reply=Info, timeout_s=30.0)
    assert isinstance(reply.body, Info)
    return reply.body


class Session:
    """An open session of one row."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.num_tokens = 0
        self._number = 0

    async def step(
        self, states: torch.Tensor, *, keep: int | None = None, timeout_s: float = STEP_TIMEOUT_S
    ) -> torch.Tensor:
        """Append hidden states [tokens, width] behind the first ``keep`` and return those that come out."""
        await self.send(states, keep=keep, timeout_s=timeout_s)
        return await self.receive(timeout_s=timeout_s)

    async def send(self, states: torch.Tensor, *, keep: int | None = None, timeout_s: float = STEP_TIMEOUT_S) -> None:
        spec, payload = encode(states)
        keep = self.num_tokens if keep is None else keep
        request = Step(
            step=self._number,
            keep=keep,
            row_tokens=(len(states),),
            tensors=(spec.to_wire(),),
            deadline_ms=int(1000 * timeout_s),
        )
        self._stream.priority = Priority.DECODE if len(states) <= 16 else Priority.BULK
        await self._stream.send(request, payload)
        self.num_tokens = keep + len(states)
        self._number += 1

    async def receive(self, *, timeout_s: float = STEP_TIMEOUT_S) -> torch.Tensor:
        reply = await self._stream.receive(timeout_s=timeout_s + 5.0)
        assert isinstance(reply.body, StepResult), reply.body
        return decode(TensorSpec.from_wire(reply.body.tensors[0]), reply.received_payload)

    def close(self) -> None:
        self._stream.cancel()


@asynccontextmanager
async def connected(address: str, count: int) -> AsyncIterator[list[Peer]]:
    """So many clients of one server, each with an identity and a connection of its own."""
    peers: list[Peer] = []
    try:
        for _ in range(count):
            peers.append(await Peer.connect(address))  # noqa: PERF401  # so that those before are closed
        yield peers
    finally:
        await asyncio.gather(*(peer.close() for peer in peers))


def states(num_tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random hidden states [tokens, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, width, generator=generator).to(dtype)


async def step_rate(sessions: Sequence[Session], token: torch.Tensor, *, prompt: int, count: int) -> float:
    """Tokens per second of sessions that each append ``count`` tokens, one by one, behind their prompts."""

    async def run(session: Session) -> None:
        for number in range(count):
            await session.step(token, keep=prompt + number)

    started_s = time.perf_counter()
    await asyncio.gather(*map(run, sessions))
    return len(sessions) * count / (time.perf_counter() - started_s)
