import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core import schema
from petals_core.errors import OverloadedError, ProtocolError, RemoteFailureError
from petals_core.testing.strategies import bodies
from petals_core.wire.messages import Body, Failure, InfoRequest, Message, Step, decode_body, encode_body


@given(bodies())
def test_every_body_decodes_to_itself(body: Body) -> None:
    assert decode_body(encode_body(body)) == body


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_body(content)


@given(bodies(), st.data())
def test_a_changed_byte_gives_a_body_or_a_protocol_error(body: Body, data: st.DataObject) -> None:
    content = bytearray(encode_body(body))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = decode_body(bytes(content))
    except ProtocolError:
        return
    assert decode_body(encode_body(changed)) == changed


@given(bodies(), st.data())
def test_a_missing_or_foreign_field_is_a_protocol_error(body: Body, data: st.DataObject) -> None:
    content = schema.unpack(encode_body(body))
    key = data.draw(st.sampled_from(sorted(content)))
    content[key] = {"a": ["map"]}
    with pytest.raises(ProtocolError):
        decode_body(schema.pack(content))


def test_unknown_fields_are_ignored_for_the_sake_of_later_versions() -> None:
    assert decode_body(schema.pack({"kind": "info?", "colour": "blue"})) == InfoRequest()


@pytest.mark.parametrize("content", [{}, {"kind": "no such"}, {"kind": 3}, {"kind": None}, [], 7, None])
def test_what_has_no_known_kind_is_refused(content: object) -> None:
    with pytest.raises(ProtocolError, match="malformed message"):
        decode_body(schema.pack(content))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", True),
        ("keep", (1 << 22) + 1),
        ("row_tokens", []),
        ("row_tokens", [-1]),
        ("row_tokens", [1] * 1025),
        ("tensors", [1] * 5),
        ("deadline_ms", 0),
        ("deadline_ms", 3_600_001),
        ("position_runs", [[[0, 0]]]),
        ("position_runs", [[[0]]]),
        ("row_order", [1024]),
    ],
)
def test_each_field_of_a_step_has_its_bounds(field: str, value: object) -> None:
    step = Step(step=0, keep=0, row_tokens=(1,), tensors=(), deadline_ms=1000)
    content = schema.unpack(encode_body(step))
    content[field] = value
    with pytest.raises(ProtocolError, match=field):
        decode_body(schema.pack(content))


def test_a_failure_carries_an_error_in_one_printable_line() -> None:
    failure = Failure.of(OverloadedError("no room\x1b[31m\nat all", retry_after_s=2.0))
    assert failure.message == "no room [31m at all"
    error = failure.to_error()
    assert type(error) is OverloadedError
    assert error.retry_after_s == 2.0


def test_an_unknown_code_becomes_a_remote_failure() -> None:
    assert type(Failure(code="from the future", message="x").to_error()) is RemoteFailureError


def test_a_message_has_an_empty_payload_when_it_has_none() -> None:
    assert Message(InfoRequest()).received_payload == b""
    assert Message(InfoRequest(), (b"abc",)).received_payload == b"abc"
