"""For tests of the ring: two servers that follow each other, with a session on each, and what a client says to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from petals_core.announcement import SignedAnnouncement
from petals_core.identity import Identity
from petals_core.net.dialer import Dialer, PeerConnection
from petals_core.net.rpc import call
from petals_core.net.stream import Stream
from petals_core.tensors.codec import TensorSpec, decode, encode
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Message, Push, Pushed, Route, Routed, Step, StepResult
from petals_server.config import ServerLimits
from petals_server.server import Server
from petals_server.testing import TIMEOUT_S, Client, Session, config_for, connected, random_states

IDS = (b"a" * 16, b"b" * 16)
"""Of the two sessions."""
STATES = random_states(1, 3)[0]


def announcement(server: Server) -> bytes:
    """What a server says of itself now, signed."""
    now_s = time.time()
    return SignedAnnouncement.sign(server._describe(now_s, now_s + 60), server._identity).encoded


@asynccontextmanager
async def chain(checkpoint: Path, **changes: Any) -> AsyncIterator[tuple[Client, Client, Session, Session]]:
    """Two servers of neighbouring spans, the clients' connections to them, and a session on each."""
    limits = ServerLimits(route_timeout_s=0.05, **changes)
    async with (
        Server(config_for(checkpoint, blocks=(0, 2), limits=limits)) as first,
        Server(config_for(checkpoint, blocks=(2, 4), limits=limits)) as second,
        connected(first) as to_first,
        connected(second) as to_second,
    ):
        yield to_first, to_second, await to_first.open(session_id=IDS[0]), await to_second.open(session_id=IDS[1])


def route(session: int, **fields: Any) -> Route:
    """A place in the chain for the first session or the second; ``fields`` go into the request."""
    return Route(**{"session_id": IDS[session], "attempt": 0, "deadline_ms": 5000, "is_last": False, **fields})


@asynccontextmanager
async def stranger(server: Server) -> AsyncIterator[tuple[Dialer, PeerConnection]]:
    """A peer that is none of the chain, connected to one of its servers."""
    dialer = Dialer(identity=Identity.ephemeral())
    try:
        yield dialer, await dialer.connect([server.address], peer_id=server.peer_id)
    finally:
        await dialer.close()


async def pushed(connection: PeerConnection) -> Stream:
    """A stream that pushes steps into the second session."""
    stream = connection.open_stream(Priority.DECODE)
    await stream.send(Push(session_id=IDS[1]))
    assert isinstance((await stream.receive(timeout_s=TIMEOUT_S)).body, Pushed)
    return stream


async def ask(client: Client, request: Any, reply: Any) -> Any:
    """The answer, of type ``reply``, to a request of one message."""
    return (await call(client.connection, request, reply=reply, timeout_s=TIMEOUT_S)).body


async def connect(to_first: Client, to_second: Client) -> None:
    """Let the first server push to the second."""
    await asyncio.gather(
        ask(to_first, route(0, next=announcement(to_second.server), next_session=IDS[1]), Routed),
        ask(to_second, route(1, is_last=True, previous=to_first.server.peer_id.digest), Routed),
    )


def step(number: int, states: torch.Tensor, keep: int, **fields: Any) -> tuple[Step, list[memoryview]]:
    """A step of one row [N, H] and its payload."""
    spec, payload = encode(states)
    return (
        Step(
            step=number,
            keep=keep,
            row_tokens=(len(states),),
            tensors=(spec.to_wire(),),
            deadline_ms=10_000,
            **fields,
        ),
        payload,
    )


def tensor(message: Message) -> torch.Tensor:
    """The states in a step or its result."""
    assert isinstance(message.body, (Step, StepResult))
    return decode(TensorSpec.from_wire(message.body.tensors[0]), message.received_payload)


async def by_hand(session: Session, other: Session, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """What comes of states that a client carries from one session to the other."""
    return [(await other.step(await session.step([each])))[0] for each in states]
