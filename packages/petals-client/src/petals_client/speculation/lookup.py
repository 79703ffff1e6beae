"""Drafts from the text itself: what followed the last time that these tokens stood here.

Saxena, "Prompt Lookup Decoding", 2023, with an index instead of a search, so that a look-up takes microseconds however
long the text is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

_KEY_TOKENS: Final = 2
"""Tokens that must agree before anything is drafted."""
_MAX_PLACES: Final = 8
"""Latest places that are remembered for the same tokens."""
MAX_MATCH: Final = 16
"""Tokens that are compared to tell a good match from a chance one."""


class Match(NamedTuple):
    """A place whose tokens may come next, and how many before it agree with those at the end."""

    place: int
    num_matching: int


class PromptLookup:
    """All tokens of one row so far, indexed by pairs."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, int], deque[int]] = {}
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the row."""
        for token in tokens:
            end = len(self._tokens)
            if end >= _KEY_TOKENS:  # a pair is worth finding once something stands behind it
                key = (self._tokens[end - 2], self._tokens[end - 1])
                self._places.setdefault(key, deque(maxlen=_MAX_PLACES)).append(end)
            self._tokens.append(token)

    def find(self) -> Match | None:
        """Return the place with the longest match, the latest of equals; None: no idea."""
        tokens = self._tokens
        if len(tokens) <= _KEY_TOKENS:
            return None
        best, num_best = 0, 0
        for place in reversed(self._places.get((tokens[-2], tokens[-1]), ())):
            num_matching = self._num_matching(place)
            if num_matching > num_best:
                best, num_best = place, num_matching
        return Match(best, num_best) if num_best else None

    def follow(self, match: Match, num_tokens: int) -> list[int]:
        """What may come next.

        A draft that reaches the end of the text goes on with itself, as text does that repeats a phrase.
        """
        period = len(self._tokens) - match.place
        return [self._tokens[match.place + index % period] for index in range(num_tokens)]

    def _num_matching(self, place: int) -> int:
        """How many tokens before ``place`` are those at the end."""
        tokens, count = self._tokens, _KEY_TOKENS
        end = len(tokens)
        while count < MAX_MATCH and count < place and tokens[place - count - 1] == tokens[end - count - 1]:
            count += 1
        return count
