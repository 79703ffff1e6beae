import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.errors import FrameTooLargeError, ProtocolError
from petals_core.limits import WireLimits
from petals_core.testing.strategies import bodies, splits
from petals_core.wire.frames import FLAG_BEGIN, HEAD, HEADER, FrameType, Header, Priority, encode_frame
from petals_core.wire.inbox import Assembly, FrameReader
from petals_core.wire.messages import Body, InfoRequest, encode_body


def feed_all(reader: FrameReader, pieces: list[bytes]) -> list[tuple[Header, bytes]]:
    return [(header, bytes(payload)) for piece in pieces for header, payload in reader.feed(piece)]


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=5), st.data())
def test_any_split_gives_the_same_frames(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(FrameType.DATA, payload, stream_id=1) for payload in payloads)
    frames = feed_all(FrameReader(1024), data.draw(splits(stream)))
    assert [payload for _, payload in frames] == payloads


def test_bytes_one_by_one() -> None:
    stream = encode_frame(FrameType.PING, b"12345678") + encode_frame(FrameType.DRAIN)
    frames = feed_all(FrameReader(1024), [stream[i : i + 1] for i in range(len(stream))])
    assert [header.type for header, _ in frames] == [FrameType.PING, FrameType.DRAIN]


def test_a_payload_that_lies_within_the_received_bytes_is_a_view_of_them() -> None:
    received = encode_frame(FrameType.DATA, b"x" * 100, stream_id=1)
    [(_, payload)] = FrameReader(1024).feed(received)
    assert payload.obj is received


def test_too_large_a_frame_is_refused_before_its_payload_is_there() -> None:
    with pytest.raises(FrameTooLargeError):
        feed_all(FrameReader(1024), [HEADER.pack(1 << 30, FrameType.DATA, 0, 1)])
    header = HEADER.pack(1 << 30, FrameType.DATA, 0, 1)
    with pytest.raises(FrameTooLargeError):
        feed_all(FrameReader(1024), [header[:3], header[3:]])


def test_frames_before_a_malformed_one_are_still_given() -> None:
    frames = FrameReader(1024).feed(encode_frame(FrameType.DRAIN) + bytes(10))
    assert next(frames)[0].type is FrameType.DRAIN
    with pytest.raises(ProtocolError):
        next(frames)


LIMITS = WireLimits(max_envelope_bytes=1000, max_message_bytes=5000)


def assemble(parts: list[memoryview]) -> Assembly:
    assembly = Assembly(parts[0], Priority.BULK, LIMITS)
    assembly.begin(parts[0])
    for part in parts[1:]:
        assert not assembly.is_complete
        assembly.add(part)
    return assembly


@given(bodies(), st.binary(max_size=2000), st.data())
def test_any_cut_into_frames_gives_the_same_message(body: Body, payload: bytes, data: st.DataObject) -> None:
    envelope = encode_body(body)
    content = envelope + payload
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content) - 1), max_size=6)))
    parts = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    head = HEAD.pack(len(envelope), len(payload))
    assembly = assemble([memoryview(head + parts[0]), *map(memoryview, parts[1:])])
    assert assembly.is_complete
    message = assembly.message()
    assert message.body == body
    assert message.received_payload == payload


def test_the_payload_of_a_single_frame_is_not_copied() -> None:
    envelope = encode_body(InfoRequest())
    content = HEAD.pack(len(envelope), 4096) + envelope + b"x" * 4096
    received = encode_frame(FrameType.DATA, content, stream_id=1, flags=FLAG_BEGIN)
    [(_, view)] = FrameReader(1 << 16).feed(received)
    payload = assemble([view]).message().payload[0]
    assert isinstance(payload, memoryview)
    assert payload.obj is received


def test_a_small_payload_does_not_keep_a_large_buffer_alive() -> None:
    envelope = encode_body(InfoRequest())
    content = HEAD.pack(len(envelope), 4) + envelope + b"abcd"
    received = encode_frame(FrameType.DATA, content, stream_id=1, flags=FLAG_BEGIN) + bytes(1000)
    _, view = next(FrameReader(1 << 16).feed(received))
    assert assemble([view]).message().payload[0] == b"abcd"
    assert not isinstance(assemble([view]).message().payload[0], memoryview)


@pytest.mark.parametrize("sizes", [(1001, 0), (1000, 4001), (0, 5001), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_too_large_a_message_is_refused_by_its_head(sizes: tuple[int, int]) -> None:
    with pytest.raises(FrameTooLargeError):
        Assembly(memoryview(HEAD.pack(*sizes)), Priority.BULK, LIMITS)


def test_a_frame_may_not_go_beyond_its_message() -> None:
    with pytest.raises(ProtocolError):
        assemble([memoryview(HEAD.pack(1, 1) + b"abc")])
    with pytest.raises(ProtocolError):
        assemble([memoryview(HEAD.pack(1, 1) + b"a"), memoryview(b"bc")])


def test_a_message_needs_an_envelope() -> None:
    with pytest.raises(ProtocolError):
        assemble([memoryview(HEAD.pack(0, 0))]).message()
