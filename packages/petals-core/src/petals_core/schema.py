"""Typed values <-> msgpack maps, with a check on every field that a peer sends.

A value is a frozen dataclass whose fields carry a ``Rule`` each. Decoding ignores unknown keys, so that later versions
may add optional fields, and refuses everything else that does not fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgpack


class SchemaError(ValueError):
    """Content does not fit its schema. Callers turn it into the documented error of their format."""


class Rule(Protocol):
    """Check one decoded msgpack value and return it in its final type; raises ``SchemaError``."""

    def __call__(self, value: Any, /) -> Any: ...


def integer(low: int, high: int) -> Rule:
    """An int within [low, high]; bool is not an int here."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise SchemaError(f"expected an integer from {low} to {high}, got {_shown(value)}")
        return value

    return check


def number(low: float, high: float) -> Rule:
    """A finite float (or int) within [low, high]."""

    def check(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise SchemaError(f"expected a number from {low} to {high}, got {_shown(value)}")
        return float(value)

    return check


def text(max_chars: int) -> Rule:
    """A str of at most ``max_chars`` printable characters (no control characters, so a terminal can show it)."""

    def check(value: Any) -> str:
        if type(value) is not str or len(value) > max_chars or not value.isprintable():
            raise SchemaError(f"expected at most {max_chars} printable characters, got {_shown(value)}")
        return value

    return check


def binary(min_bytes: int, max_bytes: int) -> Rule:
    """A bytes value of that length."""

    def check(value: Any) -> bytes:
        if type(value) is not bytes or not min_bytes <= len(value) <= max_bytes:
            raise SchemaError(f"expected {min_bytes} to {max_bytes} bytes, got {_shown(value)}")
        return value

    return check


def boolean(value: Any) -> bool:
    """A bool."""
    if type(value) is not bool:
        raise SchemaError(f"expected true or false, got {_shown(value)}")
    return value


def choice(*values: str) -> Rule:
    """One of the given strings."""

    def check(value: Any) -> str:
        if type(value) is not str or value not in values:
            raise SchemaError(f"expected one of {', '.join(values)}, got {_shown(value)}")
        return value

    return check


def optional(rule: Rule) -> Rule:
    """None, or what ``rule`` accepts."""
    return lambda value: None if value is None else rule(value)


def sequence(rule: Rule, max_items: int, min_items: int = 0) -> Rule:
    """A list of such items, as a tuple."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not min_items <= len(value) <= max_items:
            raise SchemaError(f"expected a list of {min_items} to {max_items} items, got {_shown(value)}")
        return tuple(map(rule, value))

    return check


def pair(first: Rule, second: Rule) -> Rule:
    """A list of two, as a tuple."""

    def check(value: Any) -> tuple[Any, Any]:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise SchemaError(f"expected a pair, got {_shown(value)}")
        return first(value[0]), second(value[1])

    return check


def ruled(rule: Rule, **options: Any) -> Any:
    """Declare a dataclass field that ``rule`` checks; ``options`` are those of ``dataclasses.field``."""
    return dataclasses.field(metadata={"rule": rule}, **options)


T = TypeVar("T")
_FIELDS: dict[type, tuple[tuple[str, Rule, bool], ...]] = {}


def _fields(kind: type) -> tuple[tuple[str, Rule, bool], ...]:
    found = _FIELDS.get(kind)
    if found is None:
        found = tuple(
            (
                field.name,
                field.metadata["rule"],
                field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
            )
            for field in dataclasses.fields(kind)
        )
        _FIELDS[kind] = found
    return found


def to_map(value: Any) -> dict[str, Any]:
    """Return a value's fields as a map; those that are None are left out."""
    result = {}
    for name, _, _ in _fields(type(value)):
        content = getattr(value, name)
        if content is not None:
            result[name] = content
    return result


def from_map(kind: type[T], content: Any) -> T:
    """Build a value of ``kind`` from an untrusted map.

    Raises:
        SchemaError: a field is missing or does not fit.
    """
    if type(content) is not dict:
        raise SchemaError(f"expected a map, got {_shown(content)}")
    arguments = {}
    for name, rule, is_required in _fields(kind):
        if name in content:
            try:
                arguments[name] = rule(content[name])
            except SchemaError as error:
                raise SchemaError(f"{kind.__name__}.{name}: {error}") from None
        elif is_required:
            raise SchemaError(f"{kind.__name__}.{name} is missing")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise SchemaError(f"{kind.__name__}: {error}") from None


pack: Callable[[Any], bytes] = msgpack.Packer(use_bin_type=True, strict_types=False).pack


def unpack(content: bytes | bytearray | memoryview) -> Any:
    """Decode one msgpack value from untrusted bytes of bounded length.

    Raises:
        SchemaError: the bytes are not exactly one value, or use extension types.
    """
    size = len(content)
    try:
        return msgpack.unpackb(
            content,
            raw=False,
            use_list=False,
            strict_map_key=True,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=size,
            max_map_len=size,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError, TypeError, OverflowError) as error:
        raise SchemaError(f"not a msgpack value: {type(error).__name__}") from None


def _shown(value: Any) -> str:
    """Describe an untrusted value in few characters."""
    description = repr(value) if isinstance(value, (int, float, bool, type(None))) else type(value).__name__
    return description[:40]
