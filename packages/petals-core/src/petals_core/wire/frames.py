"""Frames: the units that the messages of many streams are cut into, so that a small one overtakes a large one.

A frame is a header of 10 bytes and a payload, as ``docs/protocol.md`` lays out: payload length (u32), type (u8), flags
(u8), stream id (u32), all big-endian. This module knows the layout of single frames; what sequences of them mean is
known to ``petals_core.wire.connection``.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from petals_core.errors import FrameTooLargeError, PetalsError, ProtocolError
from petals_core.wire.messages import Buffer, Failure, decode_body, encode_body

MAX_DECODE_TOKENS: Final = 32
"""Steps up to this size overtake bulk on the wire."""


class Priority(IntEnum):
    """What leaves first: lower values overtake higher ones between two frames, yet never starve them."""

    DECODE = 0
    BULK = 1
    BACKGROUND = 2

    @classmethod
    def of_step(cls, num_tokens: int) -> Priority:
        """That of a session's step: somebody waits for few tokens."""
        return cls.DECODE if num_tokens <= MAX_DECODE_TOKENS else cls.BULK


class FrameType(IntEnum):
    """The second field of a header."""

    OPEN = 1
    """A new stream; the flags hold its priority. No payload."""
    DATA = 2
    """A part of a message; ``FLAG_BEGIN`` and ``FLAG_END`` apply."""
    CANCEL = 3
    """Both directions of a stream are given up. Payload: an error."""
    CREDIT = 4
    """Bytes that the sender of messages may have outstanding again: u32 of a stream, or u32 + u32 of stream 0."""
    PING = 5
    """8 bytes to be sent back at once."""
    PONG = 6
    DRAIN = 7
    """No new streams are taken; those that are open go on. No payload."""
    CLOSE = 8
    """The last frame. Payload: an error, or nothing when all is well."""


HEADER: Final = struct.Struct(">IBBI")
HEADER_BYTES: Final = HEADER.size
HEAD: Final = struct.Struct(">II")
"""What a message starts with: the bytes of its envelope and of its payload."""
HEAD_BYTES: Final = HEAD.size
STREAM_CREDIT: Final = struct.Struct(">I")
CONNECTION_CREDIT: Final = struct.Struct(">II")
PING_BYTES: Final = 8
MAX_ERROR_BYTES: Final = 4608
"""Largest payload of CANCEL and CLOSE: a ``Failure`` of 1,024 characters of up to 4 bytes, its code and its keys."""
MAX_STREAM_ID: Final = (1 << 32) - 1

DATA: Final = FrameType.DATA
"""By itself, for looking up an enum's member takes longer than checking a header."""

FLAG_BEGIN: Final = 0x01
"""The frame holds the head of a message and what follows it."""
FLAG_END: Final = 0x02
"""Nothing follows in this direction of the stream."""
PRIORITY_SHIFT: Final = 4
_PRIORITY_MASK: Final = 0x30

_MAX_PRIORITY = int(Priority.BACKGROUND)
_PRIORITIES = tuple(Priority)
_OF_STREAM = frozenset({FrameType.OPEN, FrameType.DATA, FrameType.CANCEL})
_SIZES: dict[FrameType, tuple[int, int]] = {
    FrameType.OPEN: (0, 0),
    FrameType.CANCEL: (1, MAX_ERROR_BYTES),
    FrameType.CREDIT: (STREAM_CREDIT.size, CONNECTION_CREDIT.size),
    FrameType.PING: (PING_BYTES, PING_BYTES),
    FrameType.PONG: (PING_BYTES, PING_BYTES),
    FrameType.DRAIN: (0, 0),
    FrameType.CLOSE: (0, MAX_ERROR_BYTES),
}


class Header(NamedTuple):
    """A checked header: known type, allowed flags, and a length within the bounds of its type.

    A tuple, for one is made for every frame.
    """

    length: int
    type: FrameType
    flags: int
    stream_id: int

    @property
    def priority(self) -> Priority:
        """The priority of a stream (OPEN) or message (DATA with ``FLAG_BEGIN``)."""
        return _PRIORITIES[self.flags >> PRIORITY_SHIFT]


def encode_frame(kind: FrameType, payload: bytes = b"", *, stream_id: int = 0, flags: int = 0) -> bytes:
    """Return a whole frame, header and payload in one piece."""
    return HEADER.pack(len(payload), kind, flags, stream_id) + payload


def parse_header(content: Buffer, offset: int = 0, *, max_frame_bytes: int) -> Header:
    """Read and check the 10 bytes at ``offset``.

    Raises:
        FrameTooLargeError: the payload is over ``max_frame_bytes``, or over what its type may have.
        ProtocolError: the type is unknown, a flag is not allowed, or the stream id does not fit the type.
    """
    length, number, flags, stream_id = HEADER.unpack_from(content, offset)
    if number == DATA:
        _check_data(length, flags, stream_id, max_frame_bytes)
        return Header(length, DATA, flags, stream_id)
    try:
        kind = FrameType(number)
    except ValueError:
        raise ProtocolError(f"frame of unknown type {number}") from None
    low, high = _SIZES[kind]
    if length > high:
        raise FrameTooLargeError(f"{kind.name} frame of {length} bytes is over {high}")
    if length < low:
        raise ProtocolError(f"{kind.name} frame of {length} bytes is too short")
    if (kind in _OF_STREAM) != (stream_id != 0) and kind is not FrameType.CREDIT:
        raise ProtocolError(f"{kind.name} frame on stream {stream_id}")
    if kind is FrameType.CREDIT and length != (CONNECTION_CREDIT if stream_id == 0 else STREAM_CREDIT).size:
        raise ProtocolError(f"CREDIT frame of {length} bytes on stream {stream_id}")
    if kind is FrameType.OPEN:
        if flags & ~_PRIORITY_MASK or flags >> PRIORITY_SHIFT > _MAX_PRIORITY:
            raise ProtocolError(f"OPEN frame with flags {flags:#04x}")
    elif flags:
        raise ProtocolError(f"{kind.name} frame with flags {flags:#04x}")
    return Header(length, kind, flags, stream_id)


def _check_data(length: int, flags: int, stream_id: int, max_frame_bytes: int) -> None:
    if length > max_frame_bytes:
        raise FrameTooLargeError(f"frame of {length} bytes is over {max_frame_bytes}")
    if stream_id == 0:
        raise ProtocolError("DATA frame on stream 0")
    if flags & FLAG_BEGIN:
        if flags & ~(_PRIORITY_MASK | FLAG_BEGIN | FLAG_END) or flags >> PRIORITY_SHIFT > _MAX_PRIORITY:
            raise ProtocolError(f"DATA frame with flags {flags:#04x}")
        if length < HEAD_BYTES:
            raise ProtocolError(f"a message begins with a frame of only {length} bytes")
    elif flags & ~FLAG_END:
        raise ProtocolError(f"DATA frame with flags {flags:#04x}")
    elif length == 0 and not flags:
        raise ProtocolError("empty DATA frame")


def encode_error(error: PetalsError) -> bytes:
    """Return the payload of CANCEL and CLOSE: the envelope of a ``Failure``."""
    return encode_body(Failure.of(error))


def decode_error(payload: Buffer) -> PetalsError:
    """Read the payload of CANCEL or CLOSE.

    Raises:
        ProtocolError: it is not the envelope of a ``Failure``.
    """
    body = decode_body(payload)
    if not isinstance(body, Failure):
        raise ProtocolError(f"expected an error, got {type(body).__name__}")
    return body.to_error()
