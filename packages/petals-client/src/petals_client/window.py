"""How a long prompt or a batch is cut, and how many of its parts are under way at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

MIN_PART_TOKENS = 32
MAX_PART_TOKENS = 512
_PARTS_PER_STAGE, _MAX_PARTS_PER_STAGE = 2, 4
"""A part takes each stage in turn, and the first has to pass all before the last is busy: more parts make that less.
But matrices of few rows are slow (``tools/bench_linear.py`` prints what they take on a CPU), so beyond two for each
stage there are more only as long as they have ``_AMPLE_TOKENS``."""
_AMPLE_TOKENS = 192
_MAX_PART_S = 0.075
"""Of a link's time for a part, which it has to take whole before the next server can begin. Where servers are slower
than the link parts wait there, and are joined."""
_PART_STEP = 16
"""Sizes by a link's rate are multiples of it."""
_UNKNOWN_PART_TOKENS = 64
"""For a link of which nothing is known."""
_FIRST_TRIP_BYTES = 14_000
"""A connection that has been idle begins slowly, with ten segments (RFC 6928) in its first round trip and twice that in
the next: a first part that needs no second one is with the last server before others would be with the second."""
_MIN_FIRST_TOKENS, _MAX_FIRST_TOKENS = 3, 8
"""Smaller ones would take the servers more time than they save."""
_LAST_PART_TOKENS = 8
_MIN_PARTS_WITH_RAMPS = 6
"""Where fewer parts of the full size would do, these are small already."""
_NEAR_S = 0.01
"""Where the next server has a part of the full size so soon, small ones cost more computing than they save waiting."""
_MAX_IN_FLIGHT = 64
_FIRST_PARTS_PER_STAGE = 3
"""Until the first results say what the chain holds: one for each of its links and servers, and as many again for delays
and for connections that begin slowly. What is too much waits at the client and, within its credit, at the first server.
"""
_GAIN = 1.25
"""Above what just fills the chain, because trips and rates vary. What is more only waits at the servers, of which those
behind then get their work later."""
_WEIGHT = 1 / 8
_MAX_WAITING_S = 10.0
"""Parts that wait only so that they can be joined take servers no longer, far from a step's deadline."""


def choose_part_sizes(
    num_tokens: int,
    num_hops: int,
    *,
    max_tokens: int,
    part_tokens: int | None = None,
    token_bytes: int,
    link_bytes_per_s: float | None,
    round_trip_s: float | None = None,
) -> list[int]:
    """Tokens of each part of a prompt; ``part_tokens`` asks for equal ones.

    The first are smaller, each twice the one before, so that the servers behind the first begin early, and so are the
    last, so that little is left to do when the last token has been sent.

    Args:
        token_bytes: of the states of one token.
        link_bytes_per_s: what the client's link takes; None: nobody knows yet.
        round_trip_s: to the first server and back; None: nobody knows.
    """
    if part_tokens is not None:
        return _equal(num_tokens, min(max_tokens, part_tokens))
    size = choose_part_tokens(num_tokens, num_hops)
    most = _UNKNOWN_PART_TOKENS
    if link_bytes_per_s is not None:
        most = most_part_tokens(token_bytes, link_bytes_per_s)
    size = min(max_tokens, size, most)
    sending_s = math.inf if link_bytes_per_s is None else size * token_bytes / link_bytes_per_s
    if sending_s + (math.inf if round_trip_s is None else round_trip_s) < _NEAR_S:
        return _equal(num_tokens, size)
    first = min(_MAX_FIRST_TOKENS, max(_MIN_FIRST_TOKENS, _FIRST_TRIP_BYTES // token_bytes))
    rising, falling = _ramp(first, size), _ramp(_LAST_PART_TOKENS, size)[::-1]
    if num_tokens < max(_MIN_PARTS_WITH_RAMPS * size, sum(rising) + sum(falling)):
        rising, falling = [], []
    return rising + _equal(num_tokens - sum(rising) - sum(falling), size) + falling


def choose_batch_sizes(
    batches: Sequence[int],
    num_hops: int,
    *,
    max_tokens: int,
    part_tokens: int | None = None,
    token_bytes: int,
    link_bytes_per_s: float | None,
) -> list[list[int]]:
    """Tokens of the parts of each micro-batch, of which one follows another: as of a prompt of all their tokens, but no
    part is of two micro-batches.

    On links so fast that they do not make parts smaller none are but the last of each micro-batch: a batch is all about
    how much is computed in a second. The arguments are those of ``choose_part_sizes``.
    """
    size = part_tokens or choose_batch_tokens(sum(batches), num_hops, token_bytes=token_bytes, link_bytes_per_s=None)
    is_fast = link_bytes_per_s is not None and size <= most_part_tokens(token_bytes, link_bytes_per_s)
    if is_fast or part_tokens is not None:
        return [_equal(num_tokens, min(max_tokens, size)) for num_tokens in batches]
    sizes = choose_part_sizes(
        sum(batches),
        num_hops,
        max_tokens=max_tokens,
        token_bytes=token_bytes,
        link_bytes_per_s=link_bytes_per_s,
    )
    if len(batches) == 1:
        return [sizes]
    first, *between, last = batches
    return [
        _fit(sizes, first),
        *(_equal(num_tokens, max(sizes)) for num_tokens in between),
        _fit(sizes[::-1], last)[::-1],
    ]


def _fit(sizes: Sequence[int], num_tokens: int) -> list[int]:
    """The first of the sizes, as many as it takes; the last one is what remains."""
    ends = [*itertools.takewhile(lambda end: end < num_tokens, itertools.accumulate(sizes)), num_tokens]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _equal(num_tokens: int, size: int) -> list[int]:
    num_full, rest = divmod(num_tokens, size)
    return [size] * num_full + ([rest] if rest else [])


def _ramp(first: int, end: int) -> list[int]:
    """Sizes from ``first`` on, each twice the one before, below ``end``."""
    sizes = []
    while first < end:
        sizes.append(first)
        first *= 2
    return sizes


def choose_part_tokens(num_tokens: int, num_hops: int) -> int:
    """Tokens of the parts of a step: enough parts to keep all servers and links of a chain at work."""
    few, many = (_stage_tokens(num_tokens, num_hops, parts) for parts in (_PARTS_PER_STAGE, _MAX_PARTS_PER_STAGE))
    return min(MAX_PART_TOKENS, max(MIN_PART_TOKENS, many, min(few, _AMPLE_TOKENS)))


def choose_join_tokens(num_tokens: int, num_hops: int) -> int:
    """Tokens of parts that a server may compute at once where they wait: as many as leave two parts for each stage."""
    return min(MAX_PART_TOKENS, max(MIN_PART_TOKENS, _stage_tokens(num_tokens, num_hops, _PARTS_PER_STAGE)))


def choose_batch_tokens(
    num_tokens: int,
    num_hops: int,
    *,
    token_bytes: int,
    link_bytes_per_s: float | None,
) -> int:
    """Tokens of whole rows that travel together: ample ones, unless the link is too long busy with these."""
    size = max(_AMPLE_TOKENS, choose_part_tokens(num_tokens, num_hops))
    if link_bytes_per_s is None:
        return size
    return min(size, most_part_tokens(token_bytes, link_bytes_per_s))


def most_part_tokens(token_bytes: int, link_bytes_per_s: float) -> int:
    """Tokens that a link is not too long busy with. The arguments are those of ``choose_part_sizes``."""
    num_steps = int(_MAX_PART_S * link_bytes_per_s / token_bytes / _PART_STEP)
    return max(MIN_PART_TOKENS, num_steps * _PART_STEP)


def _stage_tokens(num_tokens: int, num_hops: int, num_parts: int) -> int:
    """Of parts, of which there are so many for each server and link."""
    return math.ceil(num_tokens / (num_hops + 1) / num_parts / MIN_PART_TOKENS) * MIN_PART_TOKENS


class FlightWindow:
    """Parts that may be under way: what the chain holds at its rate and delay, so that nothing waits in vain.

    And no fewer than the servers may compute at once, because parts that wait for slow ones are joined. Counted in
    tokens: a prompt begins and ends with small parts, which fill little.

    The rate is that of the results; the delay the shortest trip of a part of the largest size, because every link takes
    a part whole before the next server begins with it.
    """

    def __init__(self, num_hops: int, *, part_tokens: int, join_tokens: int = 1) -> None:
        """
        Args:
            part_tokens: of the largest part.
            join_tokens: of parts that a server may compute at once.
        """
        joined = max(1, join_tokens // part_tokens)
        self._part_tokens = part_tokens
        self._least = (num_hops + 2) * part_tokens
        self._to_join = (num_hops * (2 * joined - 1) + 2) * part_tokens
        """Each server has as many as it may join while it computes as many."""
        self.limit_tokens = _FIRST_PARTS_PER_STAGE * (2 * num_hops + 1) * part_tokens
        self.tokens_in_flight = 0
        self._largest = 0
        self._least_trip_s = math.inf
        self._mean_tokens = self._mean_s = 0.0
        """Of a part, and of the time between two: averages of the same weights, also where several come together."""
        self._last_s: float | None = None

    @property
    def has_room(self) -> bool:
        """Whether another part may be sent."""
        return self.tokens_in_flight < self.limit_tokens

    def sent(self, num_tokens: int) -> None:
        """A part was sent."""
        self.tokens_in_flight += num_tokens

    def done(self, *, num_tokens: int, trip_s: float, now_s: float) -> None:
        """A part came back, ``trip_s`` after it was sent."""
        self.tokens_in_flight -= num_tokens
        if num_tokens > self._largest:
            self._largest, self._least_trip_s = num_tokens, trip_s
        elif num_tokens == self._largest:
            self._least_trip_s = min(self._least_trip_s, trip_s)
        if self._last_s is not None:
            self._mean_tokens += (num_tokens - self._mean_tokens) * _WEIGHT
            self._mean_s += (now_s - self._last_s - self._mean_s) * _WEIGHT
            token_s = max(1e-6, self._mean_s / self._mean_tokens)
            to_join = min(self._to_join, int(_MAX_WAITING_S / token_s))
            to_fill = math.ceil(_GAIN * self._least_trip_s / token_s)
            self.limit_tokens = min(_MAX_IN_FLIGHT * self._part_tokens, max(self._least, to_join, to_fill))
        self._last_s = now_s

    def begin_again(self) -> None:
        """Nothing is under way, and what comes next says nothing of the rate."""
        self.tokens_in_flight = 0
        self._last_s = None
