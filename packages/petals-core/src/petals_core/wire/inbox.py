"""Inbox: bytes into frames, and the frames of one stream into messages, copying as little as the split allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from petals_core.errors import FrameTooLargeError, ProtocolError
from petals_core.limits import WireLimits
from petals_core.wire.credit import message_cost
from petals_core.wire.frames import HEAD, HEAD_BYTES, HEADER_BYTES, Header, Priority, parse_header
from petals_core.wire.messages import Message, decode_body

_MAX_HELD_RATIO = 4
"""A payload is a view of what was received only if it is at least this fraction of it: else a message of a few bytes
would keep a large buffer alive, which no credit accounts for."""


class FrameReader:
    """Splits what arrives into frames; keeps at most one unfinished frame."""

    __slots__ = ("_max_frame_bytes", "_partial")

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._partial = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Header, memoryview]]:
        """Yield each frame that is complete with ``data``; its payload is a view of ``data`` where it lies within.

        Raises:
            FrameTooLargeError: a header announces more than is allowed; raised before its payload is awaited.
            ProtocolError: a header is malformed.
        """
        offset = 0
        if self._partial:
            offset = self._fill(HEADER_BYTES, data, 0)
            if len(self._partial) < HEADER_BYTES:
                return
            header = parse_header(self._partial, max_frame_bytes=self._max_frame_bytes)
            frame_bytes = HEADER_BYTES + header.length
            offset = self._fill(frame_bytes, data, offset)
            if len(self._partial) < frame_bytes:
                return
            payload = memoryview(bytes(self._partial))[HEADER_BYTES:]
            self._partial.clear()
            yield header, payload
        view = memoryview(data)
        size = len(data)
        while size - offset >= HEADER_BYTES:
            header = parse_header(data, offset, max_frame_bytes=self._max_frame_bytes)
            end = offset + HEADER_BYTES + header.length
            if end > size:
                break
            payload = view[offset + HEADER_BYTES : end]
            offset = end
            yield header, payload
        self._partial += view[offset:]

    def _fill(self, wanted: int, data: bytes, offset: int) -> int:
        """Bring the unfinished frame to ``wanted`` bytes if ``data`` has them; returns the new offset."""
        end = offset + max(0, wanted - len(self._partial))
        self._partial += data[offset:end]
        return min(end, len(data))


class Assembly:
    """A message that arrives: its sizes are known and checked from its first frame on.

    Raises:
        FrameTooLargeError: the message is larger than ``limits`` allow.
    """

    __slots__ = ("_envelope", "_envelope_bytes", "_left_bytes", "_payload", "_payload_bytes", "cost", "priority")

    def __init__(self, first: memoryview, priority: Priority, limits: WireLimits) -> None:
        envelope_bytes, payload_bytes = HEAD.unpack_from(first)
        if envelope_bytes > limits.max_envelope_bytes:
            raise FrameTooLargeError(f"envelope of {envelope_bytes} bytes is over {limits.max_envelope_bytes}")
        if envelope_bytes + payload_bytes > limits.max_message_bytes:
            raise FrameTooLargeError(
                f"message of {envelope_bytes + payload_bytes} bytes is over {limits.max_message_bytes}"
            )
        self.priority = priority
        self.cost = message_cost(envelope_bytes, payload_bytes)
        self._envelope_bytes = envelope_bytes
        self._payload_bytes = payload_bytes
        self._left_bytes = envelope_bytes + payload_bytes
        self._envelope: Any = b""
        self._payload: Any = b""

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are there."""
        return self._left_bytes == 0

    def begin(self, first: memoryview) -> None:
        """Add the first frame's payload, head included.

        Raises:
            ProtocolError: it holds more than the message.
        """
        if len(first) - HEAD_BYTES == self._left_bytes:
            self._left_bytes = 0
            end = HEAD_BYTES + self._envelope_bytes
            self._envelope = first[HEAD_BYTES:end]
            payload = first[end:]
            is_small = _MAX_HELD_RATIO * len(payload) < len(first.obj)  # type: ignore[arg-type]
            self._payload = bytes(payload) if is_small else payload
        else:
            # These grow as bytes arrive: a peer that announces much and sends little takes no memory.
            self._envelope = bytearray()
            self._payload = bytearray()
            self.add(first[HEAD_BYTES:])

    def add(self, part: memoryview) -> None:
        """Add the payload of a later frame.

        Raises:
            ProtocolError: it holds more than the message.
        """
        if len(part) > self._left_bytes:
            raise ProtocolError(f"a frame goes {len(part) - self._left_bytes} bytes beyond its message")
        self._left_bytes -= len(part)
        missing = self._envelope_bytes - len(self._envelope)
        if missing:
            self._envelope += part[:missing]
            part = part[missing:]
        self._payload += part

    def message(self) -> Message:
        """The complete message.

        Raises:
            ProtocolError: its envelope is malformed.
        """
        body = decode_body(self._envelope)
        return Message(body, (self._payload,) if self._payload_bytes else ())
