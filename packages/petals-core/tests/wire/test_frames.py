import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.errors import FrameTooLargeError, OverloadedError, ProtocolError, RemoteFailureError
from petals_core.wire.frames import (
    FLAG_BEGIN,
    FLAG_END,
    HEADER,
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    FrameType,
    Header,
    Priority,
    decode_error,
    encode_error,
    encode_frame,
    parse_header,
)
from petals_core.wire.messages import InfoRequest, encode_body

VALID = [
    (FrameType.OPEN, 0, 0x10, 1),
    (FrameType.DATA, 8, FLAG_BEGIN | 0x20, 1),
    (FrameType.DATA, 1, 0, 1),
    (FrameType.DATA, 0, FLAG_END, 2),
    (FrameType.CANCEL, MAX_ERROR_BYTES, 0, 1),
    (FrameType.CREDIT, 4, 0, 1),
    (FrameType.CREDIT, 8, 0, 0),
    (FrameType.PING, 8, 0, 0),
    (FrameType.PONG, 8, 0, 0),
    (FrameType.DRAIN, 0, 0, 0),
    (FrameType.CLOSE, 0, 0, 0),
]


@pytest.mark.parametrize(("kind", "length", "flags", "stream_id"), VALID)
def test_a_header_reads_as_it_was_written(kind: FrameType, length: int, flags: int, stream_id: int) -> None:
    frame = encode_frame(kind, bytes(length), stream_id=stream_id, flags=flags)
    assert len(frame) == HEADER_BYTES + length
    assert parse_header(b"x" + frame, 1, max_frame_bytes=1024) == Header(length, kind, flags, stream_id)


@pytest.mark.parametrize(
    ("kind", "length", "flags", "stream_id"),
    [
        (0, 0, 0, 0),  # unknown types
        (9, 0, 0, 0),
        (FrameType.OPEN, 0, 0, 0),  # stream ids that do not fit
        (FrameType.DATA, 1, 0, 0),
        (FrameType.CANCEL, 10, 0, 0),
        (FrameType.PING, 8, 0, 1),
        (FrameType.DRAIN, 0, 0, 2),
        (FrameType.CLOSE, 0, 0, 2),
        (FrameType.CREDIT, 8, 0, 1),
        (FrameType.CREDIT, 4, 0, 0),
        (FrameType.CREDIT, 5, 0, 1),
        (FrameType.OPEN, 0, 0x30, 1),  # flags
        (FrameType.OPEN, 0, 0x01, 1),
        (FrameType.DATA, 8, FLAG_BEGIN | 0x30, 1),
        (FrameType.DATA, 8, 0x10, 1),
        (FrameType.DATA, 8, 0x04, 1),
        (FrameType.DATA, 8, FLAG_BEGIN | 0x40, 1),
        (FrameType.PONG, 8, 1, 0),
        (FrameType.DATA, 7, FLAG_BEGIN, 1),  # too short
        (FrameType.DATA, 0, 0, 1),
        (FrameType.PING, 7, 0, 0),
        (FrameType.CANCEL, 0, 0, 1),
    ],
)
def test_a_header_that_can_not_be_is_refused(kind: int, length: int, flags: int, stream_id: int) -> None:
    with pytest.raises(ProtocolError):
        parse_header(HEADER.pack(length, kind, flags, stream_id), max_frame_bytes=1024)


@pytest.mark.parametrize(
    ("kind", "length", "stream_id"),
    [
        (FrameType.DATA, 1025, 1),
        (FrameType.OPEN, 1, 1),
        (FrameType.CANCEL, MAX_ERROR_BYTES + 1, 1),
        (FrameType.PING, 9, 0),
        (FrameType.CLOSE, MAX_ERROR_BYTES + 1, 0),
    ],
)
def test_too_large_a_frame_is_refused_by_its_header(kind: FrameType, length: int, stream_id: int) -> None:
    with pytest.raises(FrameTooLargeError):
        parse_header(HEADER.pack(length, kind, 0, stream_id), max_frame_bytes=1024)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_header_parses_or_is_a_protocol_error(content: bytes) -> None:
    try:
        header = parse_header(content, max_frame_bytes=1 << 16)
    except ProtocolError:
        return
    assert HEADER.pack(*header) == content


def test_priority_of_a_header() -> None:
    assert Header(0, FrameType.OPEN, 0x20, 1).priority is Priority.BACKGROUND
    assert Header(8, FrameType.DATA, FLAG_BEGIN, 1).priority is Priority.DECODE


def test_errors_cross_the_wire_with_code_text_and_delay() -> None:
    error = decode_error(encode_error(OverloadedError("the cache is full", retry_after_s=1.5)))
    assert type(error) is OverloadedError
    assert error.message == "the cache is full"
    assert error.retry_after_s == 1.5


def test_the_longest_error_fits_and_is_one_printable_line() -> None:
    content = encode_error(RemoteFailureError("\n" + "\U0001f600" * 5000))
    assert len(content) <= MAX_ERROR_BYTES
    assert decode_error(content).message == " " + "\U0001f600" * 1023


@pytest.mark.parametrize("content", [b"", b"\xc1", encode_body(InfoRequest())])
def test_what_is_no_error_is_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_error(content)
