"""Bytes from a terminal as names of keys."""

from __future__ import annotations

import codecs

_SEQUENCES = {
    "[A": "up", "[B": "down", "[C": "right", "[D": "left", "[H": "home", "[F": "end",
    "OA": "up", "OB": "down", "OC": "right", "OD": "left", "OH": "home", "OF": "end",
    "[1~": "home", "[4~": "end", "[5~": "page up", "[6~": "page down", "[7~": "home", "[8~": "end", "[Z": "back tab",
}  # fmt: skip
"""What terminals send behind ESC (ECMA-48 and xterm)."""
_CONTROLS = {"\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "backspace", "\x08": "backspace", "\x03": "interrupt"}


class KeyReader:
    """Collects bytes until they are keys. Unknown sequences are left out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def feed(self, content: bytes) -> list[str]:
        """The keys in what one read gave. ESC at the end of a read is the key itself."""
        text = self._decoder.decode(content)
        keys: list[str] = []
        position = 0
        while position < len(text):
            character = text[position]
            position += 1
            if character == "\x1b":
                end = _sequence_end(text, position)
                keys += ["escape"] if end == position else [_SEQUENCES.get(text[position:end], "")]
                position = end
            elif character in _CONTROLS:
                keys.append(_CONTROLS[character])
            elif character.isprintable():
                keys.append(character)
        return [key for key in keys if key]


def _sequence_end(text: str, start: int) -> int:
    """Where the control sequence that begins behind an ESC ends; ``start`` if there is none."""
    if start >= len(text) or text[start] not in "[O":
        return start
    end = start + 1
    while end < len(text) and not "@" <= text[end] <= "~":
        end += 1
    return min(end + 1, len(text))
