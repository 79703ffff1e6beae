import dataclasses
from collections.abc import Iterator

import pytest

from petals_core.errors import FrameTooLargeError, ProtocolError
from petals_core.limits import WireLimits
from petals_core.wire.frames import HEADER_BYTES, Header, Priority
from petals_core.wire.inbox import FrameReader
from petals_core.wire.messages import Buffer
from petals_core.wire.outbox import MAX_OVERTAKING_FRAMES, Outbox

LIMITS = WireLimits(
    max_frame_bytes=1024,
    max_message_bytes=100_000,
    max_envelope_bytes=2000,
    stream_credit_bytes=10_000,
    connection_credit_bytes=20_000,
)
WIDE = dataclasses.replace(LIMITS, connection_credit_bytes=1_000_000)
ENVELOPE = b"e" * 10
COST = 256 + 160


def outbox(*priorities: Priority, limits: WireLimits = LIMITS) -> Outbox:
    """An outbox with a stream of each given priority: 1, 2, ..."""
    result = Outbox(limits)
    for stream_id, priority in enumerate(priorities, 1):
        result.add_stream(stream_id, priority)
    return result


def frames(box: Outbox, max_bytes: int = 1 << 20) -> list[Header]:
    buffers: list[Buffer] = []
    box.take_frames(buffers, max_bytes)
    return [header for header, _ in FrameReader(LIMITS.max_frame_bytes).feed(b"".join(buffers))]


def one_by_one(box: Outbox) -> Iterator[int]:
    """The streams of single frames."""
    while taken := frames(box, 1):
        [header] = taken
        yield header.stream_id


def test_a_decode_step_overtakes_a_bulk_message_after_at_most_one_frame() -> None:
    box = outbox(Priority.BULK, Priority.DECODE)
    box.add_message(1, ENVELOPE, [bytes(50_000)], None, end=False)
    assert len(frames(box, 3000)) == 3
    box.add_message(2, ENVELOPE, [bytes(100)], None, end=False)
    assert next(one_by_one(box)) == 2


def test_streams_of_one_priority_take_turns() -> None:
    box = outbox(Priority.BULK, Priority.BULK, Priority.BULK)
    for stream_id in (1, 2, 3):
        box.add_message(stream_id, ENVELOPE, [bytes(3000)], None, end=False)
    assert list(one_by_one(box)) == [1, 2, 3, 1, 2, 3, 1, 2, 3]


def test_nobody_starves() -> None:
    box = outbox(Priority.DECODE, Priority.BULK, Priority.BACKGROUND, limits=WIDE)
    for stream_id in (1, 2, 3):
        box.add_message(stream_id, ENVELOPE, [bytes(90_000)], None, end=False)
    order = list(one_by_one(box))[:40]
    run = [1] * MAX_OVERTAKING_FRAMES
    assert order == [*run, 2, *run, 2, 1, 1, 1, 1, 1, 1]


def test_background_gets_its_share_of_what_bulk_gets() -> None:
    box = outbox(Priority.BULK, Priority.BACKGROUND, limits=WIDE)
    for stream_id in (1, 2):
        box.add_message(stream_id, ENVELOPE, [bytes(90_000)], None, end=False)
    assert list(one_by_one(box))[: MAX_OVERTAKING_FRAMES + 2] == [*[1] * MAX_OVERTAKING_FRAMES, 2, 1]


def test_messages_of_one_stream_stay_in_order_whatever_their_priority() -> None:
    box = outbox(Priority.BULK)
    box.add_message(1, ENVELOPE, [bytes(2000)], Priority.BULK, end=False)
    box.add_message(1, ENVELOPE, [], Priority.DECODE, end=True)
    assert [header.flags for header in frames(box)] == [0x11, 0x00, 0x03]


def test_a_message_begins_only_with_credit_of_its_stream() -> None:
    box = outbox(Priority.BULK, Priority.BULK, limits=WIDE)
    for _ in range(2):
        box.add_message(1, ENVELOPE, [bytes(9_990 - COST)], None, end=False)
    box.add_message(1, ENVELOPE, [b"x"], None, end=False)
    box.add_message(2, ENVELOPE, [b"x"], None, end=False)
    assert sum(header.flags & 1 for header in frames(box)) == 3, "two of stream 1 and one of stream 2"
    assert box.queued_bytes(1) == 8 + 10 + 1
    box.give_back_stream(1, 9_980)
    assert frames(box) == []
    box.give_back_stream(1, 1)
    assert len(frames(box)) == 1


def test_bulk_that_nobody_takes_never_blocks_a_decode_step() -> None:
    box = outbox(Priority.BULK, Priority.BULK, Priority.BULK, Priority.DECODE)
    for stream_id in (1, 2, 3):
        box.add_message(stream_id, ENVELOPE, [bytes(15_000)], None, end=False)
    box.add_message(4, ENVELOPE, [b"x"], None, end=False)
    assert {header.stream_id for header in frames(box)} == {1, 2, 4}
    box.give_back_lane(1, 15_000)
    assert {header.stream_id for header in frames(box)} == {3}


def test_more_credit_than_is_outstanding_is_refused() -> None:
    box = outbox(Priority.BULK)
    for lane in (0, 1):
        with pytest.raises(ProtocolError):
            box.give_back_lane(lane, 1)
    with pytest.raises(ProtocolError):
        box.give_back_stream(1, 1)


@pytest.mark.parametrize("taken_frames", range(4))
def test_a_removed_stream_leaves_nothing_in_line(taken_frames: int) -> None:
    box = outbox(Priority.BULK, Priority.BULK)
    box.add_message(1, ENVELOPE, [bytes(2500)], None, end=True)
    box.add_message(2, ENVELOPE, [bytes(2500)], None, end=False)
    for _ in range(taken_frames):
        frames(box, 1)
    box.remove_stream(1)
    assert set(one_by_one(box)) <= {2}
    assert box.queued_bytes(1) == 0
    assert not box.takes(1)


def test_a_removed_stream_that_waited_for_credit_leaves_nothing_behind() -> None:
    box = outbox(Priority.BULK, Priority.BULK)
    box.add_message(1, ENVELOPE, [bytes(30_000)], None, end=False)
    box.add_message(2, ENVELOPE, [], None, end=False)
    frames(box)
    box.remove_stream(2)
    box.give_back_lane(1, 30_000)
    assert frames(box) == []


def test_an_end_goes_with_the_last_message_or_by_itself() -> None:
    box = outbox(Priority.DECODE, Priority.DECODE)
    box.add_message(1, ENVELOPE, [], None, end=False)
    box.add_end(1)
    box.add_end(2)
    assert [(header.stream_id, header.length, header.flags) for header in frames(box)] == [(1, 18, 3), (2, 0, 2)]
    assert not box.takes(1)


def test_payloads_are_not_copied_and_need_not_be_bytes() -> None:
    box = outbox(Priority.BULK)
    payload = bytearray(2000)
    numbers = memoryview(bytearray(80)).cast("d").cast("B").cast("d")
    box.add_message(1, ENVELOPE, [payload, b"", numbers], None, end=False)
    assert box.queued_bytes(1) == 8 + 10 + 2000 + 80
    buffers: list[Buffer] = []
    box.take_frames(buffers, 1 << 20)
    payload[:] = b"y" * 2000
    assert b"".join(buffers).count(b"y") == 2000
    assert len(b"".join(buffers)) == 3 * HEADER_BYTES + 8 + 10 + 2000 + 80


def test_what_the_receiver_does_not_take_is_refused_before_it_is_queued() -> None:
    box = outbox(Priority.BULK)
    with pytest.raises(FrameTooLargeError, match="at most 2000"):
        box.add_message(1, bytes(2001), [], None, end=False)
    with pytest.raises(FrameTooLargeError, match="at most 100000"):
        box.add_message(1, ENVELOPE, [bytes(99_991)], None, end=True)
    assert box.takes(1)
    assert frames(box) == []
