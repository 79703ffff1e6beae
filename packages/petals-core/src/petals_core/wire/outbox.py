"""Outbox: the messages that wait to be sent, cut into frames in order of priority, within the receiver's credit."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from petals_core.errors import FrameTooLargeError
from petals_core.limits import WireLimits
from petals_core.wire.credit import NUM_LANES, SendAccount, lane_of, message_cost
from petals_core.wire.frames import (
    DATA,
    FLAG_BEGIN,
    FLAG_END,
    HEAD,
    HEAD_BYTES,
    HEADER,
    HEADER_BYTES,
    PRIORITY_SHIFT,
    Priority,
)
from petals_core.wire.messages import Buffer

MAX_OVERTAKING_FRAMES: Final = 16
"""After so many frames in a row that overtook a lower priority, that one gets a frame."""
_LAST = len(Priority) - 1


class _Item:
    """A message that waits to be sent or is half sent, or the bare end of a stream (without a front)."""

    __slots__ = ("buffers", "cost", "has_begun", "has_end", "lane", "left_bytes", "priority")

    def __init__(self, buffers: deque[Buffer], left_bytes: int, priority: Priority, cost: int, lane: int) -> None:
        self.buffers = buffers
        self.left_bytes = left_bytes
        self.priority = priority
        self.cost = cost
        self.lane = lane
        self.has_begun = False
        self.has_end = False


class _Queue:
    """What one stream still has to send."""

    __slots__ = ("account", "has_end", "is_scheduled", "items", "priority", "queued_bytes", "stream_id")

    def __init__(self, stream_id: int, priority: Priority, credit_bytes: int) -> None:
        self.stream_id = stream_id
        self.priority = priority
        self.items: deque[_Item] = deque()
        self.account = SendAccount(credit_bytes)
        self.queued_bytes = 0
        self.has_end = False
        self.is_scheduled = False
        """Whether it stands in one of the outbox's lines; it does not while it waits for credit of its stream."""


class Outbox:
    """All that waits to be sent on streams. ``limits`` are the receiver's."""

    def __init__(self, limits: WireLimits) -> None:
        self._limits = limits
        self._queues: dict[int, _Queue] = {}
        self._lines: tuple[deque[_Queue], ...] = tuple(deque() for _ in Priority)
        """Per priority the streams that may send, in turn."""
        self._lanes = tuple(SendAccount(limits.connection_credit_bytes) for _ in range(NUM_LANES))
        self._waiting: tuple[deque[_Queue], ...] = tuple(deque() for _ in range(NUM_LANES))
        """Per lane the streams whose next message can't begin for want of the connection's credit."""
        self._num_overtaking = [0] * len(Priority)

    def add_stream(self, stream_id: int, priority: Priority) -> None:
        """Make room for a new stream."""
        self._queues[stream_id] = _Queue(stream_id, priority, self._limits.stream_credit_bytes)

    def remove_stream(self, stream_id: int) -> None:
        """Forget a stream and what it has queued. What it has outstanding in its lane stays until it is given back."""
        queue = self._queues.pop(stream_id)
        if queue.is_scheduled:
            line = self._lines[queue.items[0].priority]
            if queue not in line:
                line = self._waiting[queue.items[0].lane]
            line.remove(queue)

    def clear(self) -> None:
        """Forget everything."""
        self._queues.clear()
        for line in (*self._lines, *self._waiting):
            line.clear()

    def takes(self, stream_id: int) -> bool:
        """Whether messages may be queued on the stream."""
        queue = self._queues.get(stream_id)
        return queue is not None and not queue.has_end

    def queued_bytes(self, stream_id: int) -> int:
        """Bytes of messages that wait on the stream."""
        queue = self._queues.get(stream_id)
        return 0 if queue is None else queue.queued_bytes

    def add_message(
        self, stream_id: int, envelope: bytes, payload: Sequence[Buffer], priority: Priority | None, *, end: bool
    ) -> None:
        """Queue a message on a stream that takes messages.

        Raises:
            FrameTooLargeError: it is larger than the receiver takes.
        """
        queue = self._queues[stream_id]
        if priority is None:
            priority = queue.priority
        buffers: deque[Buffer] = deque()
        payload_bytes = 0
        for buffer in payload:
            view = memoryview(buffer)
            if view.nbytes:
                payload_bytes += view.nbytes
                buffers.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
        envelope_bytes = len(envelope)
        if envelope_bytes > self._limits.max_envelope_bytes:
            raise FrameTooLargeError(
                f"the envelope takes {envelope_bytes} bytes of at most {self._limits.max_envelope_bytes}: "
                "send fewer rows at once"
            )
        if envelope_bytes + payload_bytes > self._limits.max_message_bytes:
            raise FrameTooLargeError(
                f"the message takes {envelope_bytes + payload_bytes} bytes, and the peer takes at most "
                f"{self._limits.max_message_bytes}: send fewer tokens at once"
            )
        buffers.appendleft(HEAD.pack(envelope_bytes, payload_bytes) + envelope)
        cost = message_cost(envelope_bytes, payload_bytes)
        lane = lane_of(priority, cost, self._limits.stream_credit_bytes)
        item = _Item(buffers, HEAD_BYTES + envelope_bytes + payload_bytes, priority, cost, lane)
        item.has_end = queue.has_end = end
        queue.queued_bytes += item.left_bytes
        queue.items.append(item)
        self._schedule(queue)

    def add_end(self, stream_id: int) -> None:
        """End the stream behind what is queued on it; once only."""
        queue = self._queues[stream_id]
        queue.has_end = True
        if queue.items:
            queue.items[-1].has_end = True
        else:
            item = _Item(deque(), 0, queue.priority, 0, 0)
            item.has_end = item.has_begun = True
            queue.items.append(item)
            self._schedule(queue)

    def give_back_stream(self, stream_id: int, num_bytes: int) -> None:
        """Take credit of a stream that is known here.

        Raises:
            ProtocolError: more comes back than is outstanding.
        """
        queue = self._queues[stream_id]
        queue.account.give_back(num_bytes)
        self._schedule(queue)

    def give_back_lane(self, lane: int, num_bytes: int) -> None:
        """Take credit of the connection.

        Raises:
            ProtocolError: more comes back than is outstanding.
        """
        self._lanes[lane].give_back(num_bytes)
        if self._lanes[lane].is_open:
            waiting = self._waiting[lane]
            while waiting:
                queue = waiting.popleft()
                self._lines[queue.items[0].priority].append(queue)

    def take_frames(self, buffers: list[Buffer], max_bytes: int) -> list[int]:
        """Append frames to ``buffers`` until they have ``max_bytes``; returns the streams that ended with them."""
        ended = []
        num_bytes = 0
        while num_bytes < max_bytes:
            queue = self._next_queue()
            if queue is None:
                break
            item = queue.items[0]
            if not item.has_begun:
                lane = self._lanes[item.lane]
                if not lane.is_open:
                    self._waiting[item.lane].append(queue)
                    continue
                lane.outstanding_bytes += item.cost
                queue.account.outstanding_bytes += item.cost
            num_bytes += self._take_frame(queue, item, buffers)
            queue.is_scheduled = False
            if not item.left_bytes:
                queue.items.popleft()
                if item.has_end:
                    ended.append(queue.stream_id)
            self._schedule(queue)
        return ended

    def _schedule(self, queue: _Queue) -> None:
        """Put a stream in line if it has something to send and may."""
        if queue.items and not queue.is_scheduled:
            item = queue.items[0]
            if item.has_begun or queue.account.is_open:
                self._lines[item.priority].append(queue)
                queue.is_scheduled = True

    def _next_queue(self) -> _Queue | None:
        """Take the stream whose turn it is out of its line."""
        lines = self._lines
        for priority, line in enumerate(lines):
            if not line:
                continue
            if priority < _LAST and any(lines[priority + 1 :]):
                if self._num_overtaking[priority] == MAX_OVERTAKING_FRAMES:
                    self._num_overtaking[priority] = 0
                    continue
                self._num_overtaking[priority] += 1
            return line.popleft()
        return None

    def _take_frame(self, queue: _Queue, item: _Item, buffers: list[Buffer]) -> int:
        """Append the next frame of a message; returns its bytes."""
        size = min(item.left_bytes, self._limits.max_frame_bytes)
        item.left_bytes -= size
        queue.queued_bytes -= size
        flags = FLAG_END if item.has_end and not item.left_bytes else 0
        if not item.has_begun:
            item.has_begun = True
            flags |= FLAG_BEGIN | item.priority << PRIORITY_SHIFT
        header = HEADER.pack(size, DATA, flags, queue.stream_id)
        if flags & FLAG_BEGIN and len(item.buffers[0]) <= size:
            front = item.buffers.popleft()
            buffers.append(header + front)
            wanted = size - len(front)
        else:
            buffers.append(header)
            wanted = size
        while wanted:
            buffer = item.buffers.popleft()
            if len(buffer) > wanted:
                view = memoryview(buffer)
                item.buffers.appendleft(view[wanted:])
                buffer = view[:wanted]
            buffers.append(buffer)
            wanted -= len(buffer)
        return HEADER_BYTES + size
