"""What a connection tells the shell that feeds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from petals_core.errors import PetalsError
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Message


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream; answers are best sent with its ``priority``."""

    stream_id: int
    priority: Priority


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A whole message. Call ``Connection.consumed(event)`` exactly once when the application took it or dropped it."""

    stream_id: int
    message: Message
    priority: Priority
    cost: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The peer sends no further messages on the stream; ours still go."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamCancelled:
    """Both directions of the stream are over before their end: the peer gave it up, or sent a malformed message."""

    stream_id: int
    error: PetalsError


@dataclass(frozen=True, slots=True)
class PeerDraining:
    """The peer takes no new streams; those that are open go on."""


@dataclass(frozen=True, slots=True)
class PongReceived:
    """A ping came back."""

    rtt_s: float


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The last event: all streams are gone. ``error`` is None after an orderly close by the peer."""

    error: PetalsError | None


Event: TypeAlias = (
    StreamOpened | MessageReceived | StreamEnded | StreamCancelled | PeerDraining | PongReceived | ConnectionClosed
)
