"""Random changes of valid input, for tests of parsers: of bytes, and of the values that msgpack carries."""

from __future__ import annotations

from random import Random
from typing import Any

import msgpack

INTEGERS = (-(1 << 63), -(1 << 31), -1, 0, 1, 2, 127, 128, 1023, 1024, 1025, 1 << 20, 1 << 32, 1 << 53, (1 << 64) - 1)
FLOATS = (0.0, -0.0, -1.0, 0.5, 1e-320, 60.0, 86400.5, 1e9, 1.8e9, 1.81e9, 1e308, float("inf"), float("nan"))
TEXTS = (
    "",
    "x",
    "online",
    "none",
    "bfloat16",
    "step?",
    "\x1b[2J",
    "a\nb",
    "é" * 70,
    "x" * 1025,
    "[::1]:5",
    "h:0",
    "h:99999",
)


def random_value(random: Random, depth: int = 0) -> Any:
    """A value of any type, often one at the edge of what is allowed."""
    kind = random.randrange(9 if depth < 3 else 6)
    match kind:
        case 0:
            return random.choice((None, True, False))
        case 1 | 2:
            return random.choice(INTEGERS)
        case 3:
            return random.choice(FLOATS)
        case 4:
            return random.choice(TEXTS)
        case 5:
            return random.randbytes(random.choice((0, 1, 15, 16, 32, 33)))
        case 6:
            return [random_value(random, depth + 1) for _ in range(random.choice((0, 1, 2, 3, 9)))]
        case 7:
            return {
                random.choice((*TEXTS, 1, b"k")): random_value(random, depth + 1) for _ in range(random.randrange(3))
            }
        case _:
            return random.choice(
                ([0] * 1025, msgpack.ExtType(random.randrange(128), b"x"), nested(random.choice((5, 600))))
            )


def nested(depth: int) -> list[Any]:
    """Lists within lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def mutated_value(random: Random, value: Any) -> Any:
    """``value`` with one place in its structure changed."""
    if isinstance(value, dict) and value and random.random() < 0.95:
        key = random.choice(list(value))
        changed = dict(value)
        match random.randrange(12):
            case 0:
                del changed[key]
            case 1:
                changed[random.choice(TEXTS)] = changed.pop(key)
            case _:
                changed[key] = mutated_value(random, value[key])
        return changed
    if isinstance(value, (list, tuple)) and value and random.random() < 0.8:
        items = list(value)
        index = random.randrange(len(items))
        match random.randrange(6):
            case 0:
                del items[index]
            case 1:
                items.insert(index, random_value(random, 1))
            case 2:
                items = items * random.choice((2, 300))
            case _:
                items[index] = mutated_value(random, items[index])
        return items
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.5:
        return value + random.choice((-1, 1, 2))
    return random_value(random)


def mutated_bytes(random: Random, content: bytes, other: bytes) -> bytes:
    """``content`` with bits flipped, bytes cut out, put in or taken from ``other``."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        start = random.randrange(len(changed) + 1)
        match random.randrange(6):
            case 0 | 1 | 2 if start < len(changed):
                changed[start] ^= 1 << random.randrange(8)
            case 3:
                del changed[start : start + random.choice((1, 2, 8, 1 << 20))]
            case 4:
                changed[start:start] = random.randbytes(random.choice((1, 4, 40)))
            case _:
                end = start + random.randrange(40)
                changed[start:end] = other[start:end]
    return bytes(changed)
