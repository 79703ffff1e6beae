"""What a swarm's servers hold together, and where one more helps most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Speeds: TypeAlias = NDArray[np.float64]
"""Tokens per second on each block [blocks]."""

BOTTLENECK_POWER: Final = 8
"""Of the power mean that stands for the minimum: with one block of eighty at nine tenths it loses 1 part in 60."""
_FLOOR_SHARE: Final = 0.1
"""A block counts as having at least this part of its fair share, so that a dark block does not hide all the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A server as another one weighs it: blocks ``start:end`` and what it gives to each of them."""

    peer_id: bytes
    start: int
    end: int
    tokens_per_s: float
    """What goes through the whole span, as far as it is believed."""
    is_steady: bool = True
    """It is online, answers, and has no intent to move: it may be relied on when another server leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A number of blocks that a server could hold, and what would go through them."""

    num_blocks: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A place for a server: blocks ``start:end``, and what would go through them."""

    start: int
    end: int
    tokens_per_s: float


class Coverage:
    """For each block, how many servers hold it and what they give to it together.

    Servers that are about to hold blocks count in ``speeds`` and not in ``holders``: others need not come for these
    blocks, but nobody may rely on them yet.
    """

    __slots__ = ("_promised", "capacity", "holders", "num_blocks", "num_servers", "speeds")

    def __init__(self, num_blocks: int, servers: Iterable[Placed] = ()) -> None:
        self.num_blocks = num_blocks
        self.speeds: Speeds = np.zeros(num_blocks)
        self.holders: NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        """Steady servers on each block [blocks]."""
        self._promised: NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        self.capacity = 0.0
        """Blocks times tokens per second of all servers."""
        self.num_servers = 0
        for server in servers:
            self.add(server)

    def add(self, server: Placed) -> None:
        """Count a server in."""
        self._count(server, 1)

    def remove(self, server: Placed) -> None:
        """Count a server out that was counted in."""
        self._count(server, -1)

    def copy(self) -> Coverage:
        """The same, to be changed."""
        other = Coverage(self.num_blocks)
        other.speeds, other.holders, other._promised = self.speeds.copy(), self.holders.copy(), self._promised.copy()
        other.capacity, other.num_servers = self.capacity, self.num_servers
        return other

    def without(self, server: Placed) -> Coverage:
        """The same but for one server that was counted in."""
        other = self.copy()
        other.remove(server)
        return other

    def _count(self, server: Placed, sign: int) -> None:
        window = slice(server.start, server.end)
        self.speeds[window] += sign * server.tokens_per_s
        (self.holders if server.is_steady else self._promised)[window] += sign
        self.capacity += sign * server.tokens_per_s * (server.end - server.start)
        self.num_servers += sign

    @property
    def throughput(self) -> float:
        """Tokens per second that can go through all blocks: the maximum flow, which is what the weakest block lets by.

        Between two blocks a token may change from any server to any other, so the cut through one block is the sum of
        that block's servers, and no other cut is smaller (max-flow min-cut theorem: Ford and Fulkerson 1956).
        """
        return float(np.where(self.is_dark, 0.0, self.speeds).min())

    @property
    def bound(self) -> float:
        """What no placement of the same servers can exceed: their capacity spread evenly over the blocks."""
        return self.capacity / self.num_blocks

    @property
    def balance(self) -> float:
        """``throughput`` over ``bound``; 1 where there is nothing to balance."""
        return self.throughput / self.bound if self.bound > 0 else 1.0

    @property
    def is_dark(self) -> NDArray[np.bool_]:
        """For each block whether nobody holds it or is about to [blocks]."""
        return (self.holders + self._promised) == 0

    def soft_throughput(self, share: float | None = None) -> float:
        """The power mean of order ``-BOTTLENECK_POWER`` over the blocks' speeds: a smooth form of ``throughput``.

        The minimum does not change when one of several short blocks is helped; this does. ``share`` is the mean that
        blocks are compared with; by default the present one.
        """
        share = self.bound if share is None else share
        if share <= 0:
            return 0.0
        total = float(_weights(self.speeds, share).sum())
        return share * (total / self.num_blocks) ** (-1 / BOTTLENECK_POWER)

    def choose_window(self, offers: Iterable[Offer], *, loaded: tuple[int, int] = (0, 0), price: float = 0.0) -> Window:
        """Where a server helps most that may give any one of ``offers``.

        It is the window with most dark blocks, then the one that raises ``soft_throughput`` most, then the first: so
        that servers that start one after another tile the model from its first block on. Every block outside of
        ``loaded`` costs ``price``, in tokens per second of the whole swarm. O(blocks x offers).

        Raises:
            ValueError: there are no offers, or one of more blocks than there are.
        """
        offers = tuple(offers)
        if not offers or any(not 0 < offer.num_blocks <= self.num_blocks for offer in offers):
            raise ValueError(f"no spans of {[offer.num_blocks for offer in offers]} in {self.num_blocks} blocks")
        share = (self.capacity + max(offer.tokens_per_s * offer.num_blocks for offer in offers)) / self.num_blocks
        present, is_dark = _weights(self.speeds, share), self.is_dark
        has_dark = bool(is_dark.any())
        unit = BOTTLENECK_POWER * float(present.sum()) / max(self.soft_throughput(share), 1e-300)
        """Of weights, for a token per second: the derivative of ``soft_throughput``."""
        best: tuple[int, float] = (-1, 0.0)
        window: Window | None = None
        for offer in offers:
            gains = _windows(present - _weights(self.speeds + offer.tokens_per_s, share), offer.num_blocks)
            if price:
                starts = np.arange(len(gains))
                ends = starts + offer.num_blocks
                num_kept = np.maximum(0, np.minimum(ends, loaded[1]) - np.maximum(starts, loaded[0]))
                gains -= price * unit * (offer.num_blocks - num_kept)
            num_lit = 0
            if has_dark:
                darks = _windows(is_dark.astype(np.float64), offer.num_blocks)
                num_lit = round(float(darks.max()))
                gains[darks < num_lit - 0.5] = -np.inf
            # Sums that differ by their rounding alone are equal, so that all servers choose the same.
            start = int(np.argmax(gains >= gains.max() - 1e-9 * abs(gains.max())))
            value = (num_lit, float(f"{gains[start]:.12g}"))
            if window is None or value > best:
                best, window = value, Window(start=start, end=start + offer.num_blocks, tokens_per_s=offer.tokens_per_s)
        assert window is not None
        return window


def _weights(speeds: Speeds, share: float) -> Speeds:
    relative = np.maximum(speeds, _FLOOR_SHARE * share) / share
    squared = relative * relative
    fourth = squared * squared
    return 1.0 / (fourth * fourth)


def _windows(values: Speeds, length: int) -> Speeds:
    """Sums of all windows of ``length`` values."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return sums[length:] - sums[:-length]
