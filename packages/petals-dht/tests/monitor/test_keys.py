from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_dht.monitor.keys import KeyReader


def test_keys() -> None:
    read = KeyReader().feed
    assert read(b"q") == ["q"]
    assert read(b"\x1b[A\x1bOB\x1b[5~") == ["up", "down", "page up"]
    assert read(b"\x1b") == ["escape"]
    assert read(b"\x1bq") == ["escape", "q"]
    assert read(b"\x1b[1;5Cx") == ["x"]
    assert read(b"\r\t\x7f\x00") == ["enter", "tab", "backspace"]


def test_a_letter_that_comes_in_two_parts() -> None:
    reader = KeyReader()
    assert reader.feed("ü".encode()[:1]) == []
    assert reader.feed("ü".encode()[1:]) == ["ü"]


@given(st.binary(max_size=60))
def test_any_bytes_are_taken(content: bytes) -> None:
    assert all(key.isprintable() for key in KeyReader().feed(content))
