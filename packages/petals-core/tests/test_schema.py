import contextlib
import math
from dataclasses import dataclass

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core import schema
from petals_core.schema import SchemaError, ruled


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    name: str = ruled(schema.text(5))
    count: int = ruled(schema.integer(0, 10))
    note: str | None = ruled(schema.optional(schema.text(5)), default=None)

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("bad name")


@pytest.mark.parametrize(
    ("rule", "accepted", "result"),
    [
        (schema.integer(-1, 3), 3, 3),
        (schema.number(0, 1), 1, 1.0),
        (schema.text(3), "日本語", "日本語"),
        (schema.binary(1, 2), b"ab", b"ab"),
        (schema.boolean, True, True),
        (schema.choice("a", "b"), "b", "b"),
        (schema.optional(schema.boolean), None, None),
        (schema.sequence(schema.boolean, 2), [True, False], (True, False)),
        (schema.pair(schema.boolean, schema.integer(0, 1)), [True, 1], (True, 1)),
    ],
)
def test_rules_accept_what_fits_in_its_final_type(rule: schema.Rule, accepted: object, result: object) -> None:
    assert rule(accepted) == result
    assert type(rule(accepted)) is type(result)


@pytest.mark.parametrize(
    ("rule", "refused"),
    [
        (schema.integer(-1, 3), -2),
        (schema.integer(-1, 3), 4),
        (schema.integer(-1, 3), True),
        (schema.integer(-1, 3), 1.0),
        (schema.number(0, 1), math.nan),
        (schema.number(0, 1), math.inf),
        (schema.number(0, 1), 1.1),
        (schema.number(0, 1), True),
        (schema.text(3), "abcd"),
        (schema.text(9), "a\x1b[1m"),
        (schema.text(9), "a\nb"),
        (schema.text(9), b"ab"),
        (schema.binary(2, 3), b"a"),
        (schema.binary(2, 3), b"abcd"),
        (schema.binary(0, 3), "ab"),
        (schema.boolean, 1),
        (schema.choice("a"), "b"),
        (schema.choice("a"), ["a"]),
        (schema.optional(schema.boolean), 0),
        (schema.sequence(schema.boolean, 2), [True] * 3),
        (schema.sequence(schema.boolean, 2, 1), []),
        (schema.sequence(schema.boolean, 2), "ab"),
        (schema.sequence(schema.boolean, 2), [1]),
        (schema.pair(schema.boolean, schema.boolean), [True]),
        (schema.pair(schema.boolean, schema.boolean), True),
    ],
)
def test_rules_refuse_what_does_not_fit(rule: schema.Rule, refused: object) -> None:
    with pytest.raises(SchemaError):
        rule(refused)


def test_a_value_becomes_a_map_without_its_nones_and_back() -> None:
    value = Example(name="abc", count=3)
    assert schema.to_map(value) == {"name": "abc", "count": 3}
    assert schema.from_map(Example, {"name": "abc", "count": 3, "of a later version": 1}) == value


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"name": "abc"}, "Example.count is missing"),
        ({"name": "abc", "count": 11}, "Example.count: expected an integer from 0 to 10, got 11"),
        ({"name": "bad", "count": 1}, "bad name"),
        ([], "expected a map"),
    ],
)
def test_what_makes_no_value_is_refused_with_its_reason(content: object, text: str) -> None:
    with pytest.raises(SchemaError, match=text):
        schema.from_map(Example, content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(VALUES)
def test_values_survive_packing(value: object) -> None:
    assert schema.unpack(schema.pack(value)) == value


@given(st.binary(max_size=60))
def test_garbage_raises_schema_errors_only(content: bytes) -> None:
    with contextlib.suppress(SchemaError):
        schema.unpack(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x01",
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\x91" * 5000 + b"\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xa2\xff\xff",
        b"\x81\x90\x01",
        b"\x81\xc0\x01",
    ],
    ids=["nothing", "two", "extension", "timestamp", "deep", "huge", "no utf-8", "list as key", "none as key"],
)
def test_what_is_not_one_plain_value_is_refused(content: bytes) -> None:
    with pytest.raises(SchemaError):
        schema.unpack(content)


def test_an_error_shows_little_of_what_was_sent() -> None:
    with pytest.raises(SchemaError) as caught:
        schema.integer(0, 1)("x" * 10_000)
    assert "got str" in str(caught.value)
    with pytest.raises(SchemaError) as caught:
        schema.integer(0, 1)(10**60)
    assert len(str(caught.value)) < 100
