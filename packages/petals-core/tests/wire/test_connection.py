import pytest

from petals_core.errors import (
    CancelledByPeerError,
    DrainingError,
    FrameTooLargeError,
    OverloadedError,
    PeerConnectionError,
    PetalsError,
    ProtocolError,
    RemoteFailureError,
)
from petals_core.limits import MIB, WireLimits
from petals_core.testing.pair import Pair
from petals_core.wire.connection import Connection
from petals_core.wire.events import (
    ConnectionClosed,
    Event,
    MessageReceived,
    PeerDraining,
    PongReceived,
    StreamCancelled,
    StreamEnded,
    StreamOpened,
)
from petals_core.wire.frames import (
    CONNECTION_CREDIT,
    FLAG_BEGIN,
    FLAG_END,
    HEAD,
    STREAM_CREDIT,
    FrameType,
    Priority,
    decode_error,
    encode_error,
    encode_frame,
    parse_header,
)
from petals_core.wire.inbox import FrameReader
from petals_core.wire.messages import Info, InfoRequest, Message, SessionOpened, Step, encode_body

REQUEST = InfoRequest()
REPLY = SessionOpened(cache_tokens_left=7)


def listener(limits: WireLimits | None = None, remote: WireLimits | None = None) -> Connection:
    """A listener's end that is fed by hand."""
    return Connection(
        is_dialer=False, local_limits=limits or WireLimits(), remote_limits=remote or WireLimits(), now=0.0
    )


def sent_frames(connection: Connection) -> list[tuple[FrameType, int, bytes]]:
    """All that a connection gives out, as (type, stream id, payload)."""
    data = b""
    while buffers := connection.data_to_send():
        data += b"".join(buffers)
    return [(header.type, header.stream_id, bytes(payload)) for header, payload in FrameReader(1 << 20).feed(data)]


def open_frame(stream_id: int = 1) -> bytes:
    return encode_frame(FrameType.OPEN, stream_id=stream_id)


def message_frame(stream_id: int = 1, envelope: bytes | None = None, payload: bytes = b"", flags: int = 0) -> bytes:
    envelope = encode_body(REQUEST) if envelope is None else envelope
    content = HEAD.pack(len(envelope), len(payload)) + envelope + payload
    return encode_frame(FrameType.DATA, content, stream_id=stream_id, flags=FLAG_BEGIN | flags)


def the_end(events: list[Event]) -> PetalsError | None:
    """The error of the last event, which closes the connection."""
    assert isinstance(events[-1], ConnectionClosed)
    return events[-1].error


# --- messages and streams ---------------------------------------------------------------------------------------------


def test_a_request_and_its_reply() -> None:
    pair = Pair()
    stream_id = pair.dialer.open_stream(Priority.DECODE)
    pair.dialer.send_message(stream_id, REQUEST, [b"ab", b"cd"], end=True)
    pair.move(0)
    opened, received, ended = pair.events[1]
    assert opened == StreamOpened(stream_id, Priority.DECODE)
    assert isinstance(received, MessageReceived)
    assert (received.message.body, received.message.received_payload) == (REQUEST, b"abcd")
    assert received.priority is Priority.DECODE
    assert ended == StreamEnded(stream_id)
    pair.listener.send_message(stream_id, REPLY, end=True)
    pair.move(1)
    assert [type(event) for event in pair.events[0]] == [MessageReceived, StreamEnded]
    assert pair.dialer.num_streams == pair.listener.num_streams == 0


def test_both_ends_open_streams() -> None:
    pair = Pair()
    assert [pair.dialer.open_stream() for _ in range(2)] == [1, 3]
    assert [pair.listener.open_stream() for _ in range(2)] == [2, 4]
    pair.settle()
    assert pair.dialer.num_streams == pair.listener.num_streams == 4


def test_a_decode_step_is_one_frame_in_one_write() -> None:
    pair = Pair()
    stream_id = pair.dialer.open_stream(Priority.DECODE)
    pair.settle()
    step = Step(step=1, keep=1, row_tokens=(1,), tensors=(), deadline_ms=1000)
    pair.dialer.send_message(stream_id, step, [bytes(4096)])
    data = b"".join(pair.dialer.data_to_send())
    header = parse_header(data, max_frame_bytes=1 << 16)
    assert len(data) == 10 + header.length
    assert pair.dialer.data_to_send() == []


def test_a_large_message_comes_in_many_frames_and_whole() -> None:
    pair = Pair()
    stream_id = pair.dialer.open_stream()
    payload = bytes(range(256)) * 4096
    pair.dialer.send_message(stream_id, REQUEST, [payload[:1000], memoryview(payload)[1000:]])
    assert pair.dialer.queued_bytes(stream_id) > len(payload)
    pair.settle()
    received = pair.events[1][-1]
    assert isinstance(received, MessageReceived)
    assert received.message.received_payload == payload
    assert pair.dialer.queued_bytes(stream_id) == 0


def test_a_decode_step_overtakes_ten_megabytes() -> None:
    pair = Pair()
    bulk, decode = pair.dialer.open_stream(Priority.BULK), pair.dialer.open_stream(Priority.DECODE)
    pair.dialer.send_message(bulk, REQUEST, [bytes(10 * MIB)])
    pair.move(0)
    pair.dialer.send_message(decode, REQUEST, [bytes(4096)])
    pair.move(0, max_bytes=1)
    assert [event.stream_id for event in pair.untaken[1]] == [decode]


def test_messages_may_have_priorities_of_their_own() -> None:
    pair = Pair()
    first, second = pair.dialer.open_stream(Priority.BULK), pair.dialer.open_stream(Priority.BULK)
    pair.dialer.send_message(first, REQUEST)
    pair.dialer.send_message(second, REQUEST, priority=Priority.DECODE)
    pair.settle()
    received = [event for event in pair.events[1] if isinstance(event, MessageReceived)]
    assert [(event.stream_id, event.priority) for event in received] == [(second, 0), (first, 1)]


def test_ending_twice_or_a_stream_that_is_gone_does_nothing() -> None:
    pair = Pair()
    stream_id = pair.dialer.open_stream()
    for _ in range(2):
        pair.dialer.end_stream(stream_id)
    pair.settle()
    assert pair.events[1] == [StreamOpened(stream_id, Priority.BULK), StreamEnded(stream_id)]
    pair.listener.end_stream(stream_id)
    pair.settle()
    pair.listener.end_stream(stream_id)
    assert pair.listener.data_to_send() == []


def test_nothing_is_sent_behind_the_end() -> None:
    pair = Pair()
    stream_id = pair.dialer.open_stream()
    pair.dialer.end_stream(stream_id)
    with pytest.raises(CancelledByPeerError):
        pair.dialer.send_message(stream_id, REQUEST)
    with pytest.raises(CancelledByPeerError):
        pair.dialer.send_message(99, REQUEST)


def test_streams_at_once_are_bounded_and_room_comes_back() -> None:
    pair = Pair(listener_limits=WireLimits(max_streams=2))
    first, _ = pair.dialer.open_stream(), pair.dialer.open_stream()
    with pytest.raises(OverloadedError):
        pair.dialer.open_stream()
    pair.dialer.cancel_stream(first)
    pair.dialer.open_stream()
    pair.settle()
    assert not pair.listener.is_closed
    assert pair.listener.num_streams == 2


def test_too_large_a_message_is_refused_at_the_sender() -> None:
    pair = Pair(listener_limits=WireLimits(max_message_bytes=5000))
    stream_id = pair.dialer.open_stream()
    with pytest.raises(FrameTooLargeError, match="send fewer tokens"):
        pair.dialer.send_message(stream_id, REQUEST, [bytes(5000)], end=True)
    pair.dialer.send_message(stream_id, REQUEST, end=True)
    pair.settle()
    assert pair.events[1][-1] == StreamEnded(stream_id)


# --- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("canceller", [0, 1])
def test_a_cancelled_stream_ends_at_both_sides_with_the_error(canceller: int) -> None:
    pair = Pair()
    stream_id = pair.dialer.open_stream()
    pair.dialer.send_message(stream_id, REQUEST, [bytes(1 * MIB)])
    pair.move(0)
    pair.ends[canceller].cancel_stream(stream_id, RemoteFailureError("the disk is full"))
    pair.ends[canceller].cancel_stream(stream_id)
    pair.settle()
    cancelled = pair.events[1 - canceller][-1]
    assert isinstance(cancelled, StreamCancelled)
    assert type(cancelled.error) is RemoteFailureError
    assert cancelled.error.message == "the disk is full"
    assert pair.dialer.num_streams == pair.listener.num_streams == 0
    assert not pair.dialer.is_closed
    assert not pair.listener.is_closed


def test_cancelled_messages_give_their_credit_back() -> None:
    """A thousand times the connection's credit goes through, all of it cancelled half-way."""
    limits = WireLimits(stream_credit_bytes=4096, connection_credit_bytes=100_000)
    pair = Pair(listener_limits=limits)
    for number in range(300):
        pair.now += 1.0
        stream_id = pair.dialer.open_stream()
        pair.dialer.send_message(stream_id, REQUEST, [bytes(300_000)])
        assert pair.move(0) > 65_536, "the message does not begin"
        pair.ends[number % 2].cancel_stream(stream_id)
        pair.move(number % 2)
        pair.move(1 - number % 2)
        pair.move(1)


def test_a_malformed_envelope_costs_its_stream_only() -> None:
    connection = listener()
    events = connection.receive_data(
        open_frame(1) + open_frame(3) + message_frame(1, b"\xc1") + message_frame(1) + message_frame(3), 0.0
    )
    assert [type(event) for event in events] == [StreamOpened, StreamOpened, StreamCancelled, MessageReceived]
    assert isinstance(events[2], StreamCancelled)
    assert type(events[2].error) is ProtocolError
    [(kind, stream_id, payload)] = sent_frames(connection)
    assert (kind, stream_id) == (FrameType.CANCEL, 1)
    assert "malformed message" in decode_error(payload).message


# --- credit -----------------------------------------------------------------------------------------------------------


def test_a_receiver_that_takes_nothing_is_sent_its_credit_and_no_more() -> None:
    pair = Pair(listener_limits=WireLimits(stream_credit_bytes=10_000))
    stream_id = pair.dialer.open_stream()
    for _ in range(20):
        pair.dialer.send_message(stream_id, REQUEST, [bytes(4000)])
    while pair.move(0):
        pass
    assert len(pair.untaken[1]) == 3
    pair.settle()
    assert len([event for event in pair.events[1] if isinstance(event, MessageReceived)]) == 20


def test_credit_of_steps_goes_back_in_portions() -> None:
    pair = Pair(listener_limits=WireLimits(stream_credit_bytes=100_000))
    stream_id = pair.dialer.open_stream(Priority.DECODE)
    answers = 0
    for _ in range(100):
        pair.dialer.send_message(stream_id, REQUEST, [bytes(4096)])
        pair.move(0)
        pair.take(1)
        answers += pair.move(1) > 0
    assert answers == 8


def test_messages_without_credit_end_the_connection() -> None:
    connection = listener(WireLimits(stream_credit_bytes=1024, connection_credit_bytes=1 << 20))
    events = connection.receive_data(open_frame() + 4 * message_frame(payload=bytes(300)), 0.0)
    error = the_end(events)
    assert type(error) is ProtocolError
    assert "without credit" in error.message


def test_streams_together_are_held_to_the_credit_of_the_connection() -> None:
    connection = listener(WireLimits(connection_credit_bytes=2048))
    data = b"".join(open_frame(i) + message_frame(i, payload=bytes(700)) for i in (1, 3, 5))
    error = the_end(connection.receive_data(data, 0.0))
    assert error is not None
    assert "without credit" in error.message


# --- what breaks the protocol -----------------------------------------------------------------------------------------

BROKEN = {
    "unknown type": encode_frame(FrameType.DRAIN)[:4] + b"\x63" + bytes(5),
    "own id opened": encode_frame(FrameType.OPEN, stream_id=2),
    "id left out": open_frame(3),
    "opened twice": open_frame(1) + open_frame(1),
    "never opened": message_frame(1),
    "cancel of nothing": encode_frame(FrameType.CANCEL, encode_error(ProtocolError("x")), stream_id=1),
    "malformed cancel": open_frame() + encode_frame(FrameType.CANCEL, b"\xc1", stream_id=1),
    "credit for nothing": encode_frame(FrameType.CREDIT, STREAM_CREDIT.pack(1), stream_id=1),
    "credit of nothing": encode_frame(FrameType.CREDIT, CONNECTION_CREDIT.pack(0, 0)),
    "too much credit": encode_frame(FrameType.CREDIT, CONNECTION_CREDIT.pack(0, 1)),
    "too much credit of a stream": open_frame() + encode_frame(FrameType.CREDIT, STREAM_CREDIT.pack(1), stream_id=1),
    "pong without ping": encode_frame(FrameType.PONG, bytes(8)),
    "no message": open_frame() + encode_frame(FrameType.DATA, b"x", stream_id=1),
    "beyond the message": open_frame()
    + encode_frame(FrameType.DATA, HEAD.pack(1, 1) + b"abc", stream_id=1, flags=FLAG_BEGIN),
    "ends within a message": open_frame()
    + encode_frame(FrameType.DATA, HEAD.pack(9, 9), stream_id=1, flags=FLAG_BEGIN | FLAG_END),
    "begins within a message": open_frame()
    + 2 * encode_frame(FrameType.DATA, HEAD.pack(9, 9), stream_id=1, flags=FLAG_BEGIN),
    "behind the end": open_frame() + message_frame(flags=FLAG_END) + message_frame(),
    "too large a message": open_frame()
    + encode_frame(FrameType.DATA, HEAD.pack(9, 1 << 30), stream_id=1, flags=FLAG_BEGIN),
    "too large a frame": open_frame() + b"\x7f" + encode_frame(FrameType.DATA, b"x", stream_id=1)[1:],
    "malformed close": encode_frame(FrameType.CLOSE, b"\xc1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_breaks_the_protocol_closes_the_connection_and_says_why(name: str) -> None:
    connection = listener()
    error = the_end(connection.receive_data(BROKEN[name], 0.0))
    assert isinstance(error, ProtocolError)
    assert isinstance(error, FrameTooLargeError) == name.startswith("too large")
    kind, _, payload = sent_frames(connection)[-1]
    assert kind is FrameType.CLOSE
    assert decode_error(payload).message == error.message
    assert connection.is_closed
    assert connection.num_streams == 0
    assert connection.next_wakeup() is None
    assert connection.receive_data(open_frame(), 1.0) == []
    assert connection.handle_timeout(1e9) == []


def test_more_streams_than_allowed_end_the_connection() -> None:
    connection = listener(WireLimits(max_streams=2))
    error = the_end(connection.receive_data(open_frame(1) + open_frame(3) + open_frame(5), 0.0))
    assert error is not None
    assert "more than 2 streams" in error.message


def flood(connection: Connection, frames: list[bytes], *, seconds_each: float = 0.0) -> int:
    """How many of ``frames`` a connection bears."""
    for number, frame in enumerate(frames):
        if connection.is_closed:
            return number
        connection.receive_data(frame, number * seconds_each)
        connection.data_to_send()
    return len(frames)


def resets(count: int) -> list[bytes]:
    cancel = encode_error(CancelledByPeerError("never mind"))
    ids = range(1, 2 * count, 2)
    return [open_frame(i) + encode_frame(FrameType.CANCEL, cancel, stream_id=i) for i in ids]


def test_opening_and_cancelling_in_a_flood_ends_the_connection() -> None:
    assert flood(listener(), resets(5000)) < 1200
    assert flood(listener(), resets(5000), seconds_each=0.01) == 5000


def test_malformed_messages_in_a_flood_end_the_connection() -> None:
    frames = [open_frame(i) + message_frame(i, b"\xc1") for i in range(1, 10_000, 2)]
    assert flood(listener(), frames) < 1200


def test_pings_in_a_flood_end_the_connection() -> None:
    pings = [encode_frame(FrameType.PING, bytes(8))] * 1000
    assert flood(listener(), pings) < 100
    assert flood(listener(), pings, seconds_each=0.1) == 1000


def test_a_peer_that_does_not_read_can_not_make_answers_pile_up() -> None:
    connection = listener()
    events: list[Event] = []
    for number in range(5000):
        events += connection.receive_data(encode_frame(FrameType.PING, bytes(8)), number / 10)
    error = the_end(events)
    assert error is not None
    assert "does not read" in error.message


# --- ping, silence, drain, close --------------------------------------------------------------------------------------


def test_a_ping_measures_the_round_trip() -> None:
    pair = Pair()
    pair.dialer.ping(pair.now)
    pair.move(0)
    pair.now = 0.25
    pair.move(1)
    assert pair.events[0] == [PongReceived(0.25)]


def test_silence_is_pinged_and_answered_silence_lasts_for_ever() -> None:
    pair = Pair()
    for _ in range(20):
        wakeup = pair.dialer.next_wakeup()
        assert wakeup is not None
        pair.now = wakeup
        assert pair.dialer.handle_timeout(pair.now - 0.001) == []
        assert pair.dialer.handle_timeout(pair.now) == []
        assert pair.move(0) > 0
        assert pair.move(1) > 0
    assert pair.now == pytest.approx(200, abs=1)


def test_a_peer_that_stays_silent_is_dead() -> None:
    connection = listener()
    events: list[Event] = []
    while (now := connection.next_wakeup()) is not None:
        events += connection.handle_timeout(now)
    error = the_end(events)
    assert type(error) is PeerConnectionError
    assert "no sign of life for 30 s" in error.message
    assert [kind for kind, _, _ in sent_frames(connection)] == [FrameType.PING, FrameType.PING, FrameType.CLOSE]


def test_a_draining_end_finishes_what_is_open_and_refuses_what_is_new() -> None:
    pair = Pair()
    old = pair.dialer.open_stream()
    pair.settle()
    pair.listener.drain()
    pair.listener.drain()
    late = pair.dialer.open_stream()
    pair.dialer.send_message(late, REQUEST)
    pair.dialer.send_message(old, REQUEST, end=True)
    pair.settle()
    assert PeerDraining() in pair.events[0]
    assert pair.events[0].count(PeerDraining()) == 1
    [cancelled] = [event for event in pair.events[0] if isinstance(event, StreamCancelled)]
    assert cancelled.stream_id == late
    assert type(cancelled.error) is DrainingError
    assert [event.stream_id for event in pair.events[1] if not isinstance(event, StreamOpened)] == [old, old]  # type: ignore[union-attr]
    for end in pair.ends:
        assert end.is_draining
        with pytest.raises(DrainingError):
            end.open_stream()
    pair.listener.send_message(old, REPLY, end=True)
    pair.settle()
    assert pair.dialer.num_streams == pair.listener.num_streams == 0


@pytest.mark.parametrize("error", [None, OverloadedError("go away", retry_after_s=4.0)])
def test_a_close_says_why_and_ends_everything(error: PetalsError | None) -> None:
    pair = Pair()
    stream_id = pair.dialer.open_stream()
    pair.dialer.send_message(stream_id, REQUEST, [bytes(1 * MIB)])
    pair.move(0)
    pair.dialer.close(error)
    pair.dialer.close(error)
    pair.move(0)
    closed = pair.events[1][-1]
    assert isinstance(closed, ConnectionClosed)
    if error is None:
        assert closed.error is None
    else:
        assert type(closed.error) is OverloadedError
        assert closed.error.message == error.message
    assert pair.listener.data_to_send() == pair.dialer.data_to_send() == []
    for end in pair.ends:
        assert end.num_streams == 0
        with pytest.raises(PeerConnectionError):
            end.open_stream()
        with pytest.raises(PeerConnectionError):
            end.send_message(stream_id, REQUEST)
        end.cancel_stream(stream_id)
        end.end_stream(stream_id)
        end.ping(0.0)
        end.drain()
        assert end.data_to_send() == []


def test_the_end_of_the_transport_is_an_error_unless_closed_before() -> None:
    connection = listener()
    error = the_end(connection.receive_eof(1.0))
    assert type(error) is PeerConnectionError
    assert connection.receive_eof(1.0) == []
    closed = listener()
    closed.receive_data(encode_frame(FrameType.CLOSE), 0.0)
    assert closed.receive_eof(1.0) == []


def test_consuming_behind_the_end_of_everything_does_nothing() -> None:
    connection = listener()
    connection.close()
    connection.data_to_send()
    connection.consumed(MessageReceived(1, Message(REQUEST), Priority.BULK, 1 << 30))
    assert connection.data_to_send() == []


def test_an_info_reply_crosses_unchanged() -> None:
    info = Info(
        model_name="m",
        fingerprint="f",
        num_blocks=12,
        start=0,
        end=4,
        state="online",
        torch_dtype="bfloat16",
        quantization="none",
        version="1",
        public_name="ユーザー",
        cache_tokens_left=5,
        num_sessions=0,
    )
    pair = Pair()
    pair.dialer.send_message(pair.dialer.open_stream(), info)
    pair.settle()
    received = pair.events[1][-1]
    assert isinstance(received, MessageReceived)
    assert received.message == Message(info)
