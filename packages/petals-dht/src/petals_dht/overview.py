"""What a swarm serves, as values and as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from petals_core.announcement import Announcement, SignedAnnouncement

_STRIP_CHARACTERS = 64


@dataclass(frozen=True, slots=True, order=True)
class ModelSummary:
    """One model that servers of the swarm have announced."""

    model_name: str
    fingerprint: str
    num_blocks: int
    expires_at_s: float
    """Unix time; servers renew it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOverview:
    """One model and its live servers, by their first block."""

    model: ModelSummary
    servers: tuple[SignedAnnouncement, ...]

    @classmethod
    def of(cls, model: ModelSummary, servers: Iterable[SignedAnnouncement]) -> ModelOverview:
        """Keep the servers that describe the same model, in the order of their blocks."""
        fitting = (signed for signed in servers if signed.announcement.num_blocks == model.num_blocks)
        return cls(model=model, servers=tuple(sorted(fitting, key=_place)))

    @property
    def coverage(self) -> tuple[int, ...]:
        """Per block the number of servers that take new work for it."""
        counts = [0] * self.model.num_blocks
        for signed in self.servers:
            announcement = signed.announcement
            if announcement.state == "online":
                for block in range(announcement.start, announcement.end):
                    counts[block] += 1
        return tuple(counts)

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """The spans (start, one past the end) that no server holds."""
        spans = []
        for count, group in groupby(enumerate(self.coverage), key=lambda item: min(item[1], 1)):
            blocks = [block for block, _ in group]
            if not count:
                spans.append((blocks[0], blocks[-1] + 1))
        return tuple(spans)

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {
            "name": self.model.model_name,
            "fingerprint": self.model.fingerprint,
            "num_blocks": self.model.num_blocks,
            "coverage": list(self.coverage),
            "missing": [list(span) for span in self.missing],
            "servers": [_server_to_json(signed) for signed in self.servers],
        }


def _place(signed: SignedAnnouncement) -> tuple[int, int, bytes]:
    return signed.announcement.start, signed.announcement.end, signed.public_key


def _server_to_json(signed: SignedAnnouncement) -> dict[str, Any]:
    announcement = signed.announcement
    return {
        "peer_id": str(signed.peer_id),
        "public_name": announcement.public_name,
        "state": announcement.state,
        "start": announcement.start,
        "end": announcement.end,
        "addresses": [str(address) for address in announcement.addresses],
        "torch_dtype": announcement.torch_dtype,
        "quantization": announcement.quantization,
        "adapters": list(announcement.adapters),
        "inference_tokens_per_s": announcement.inference_tokens_per_s,
        "forward_tokens_per_s": announcement.forward_tokens_per_s,
        "cache_tokens_left": announcement.cache_tokens_left,
        "load": announcement.load,
        "version": announcement.version,
        "expires_at_s": announcement.expires_at_s,
    }


def strip_of(coverage: Sequence[int], max_characters: int = _STRIP_CHARACTERS) -> str:
    """The coverage in one line: a digit per block, ``·`` where nobody serves it and ``+`` for ten or more.

    A model with more blocks than characters shows the worst of several neighbouring blocks in each.
    """
    length = min(len(coverage), max_characters)
    bounds = [position * len(coverage) // length for position in range(length + 1)]
    worst = [min(coverage[start:end]) for start, end in pairwise(bounds)]
    return "".join("·" if not count else str(count) if count < 10 else "+" for count in worst)


def spans_text(spans: Sequence[tuple[int, int]]) -> str:
    """``0:4, 8:12``."""
    return ", ".join(f"{start}:{end}" for start, end in spans)


def clock_text(offset_s: float) -> str:
    """What is wrong where this machine's clock is ``offset_s`` behind the announcements, or ahead if negative."""
    way = "behind" if offset_s > 0 else "ahead"
    return (
        f"this machine's clock seems to be about {abs(offset_s) / 60:.0f} minutes {way}, so that all announcements are "
        "refused: set it right"
    )


def choose(overviews: Sequence[ModelOverview], wanted: str | None) -> list[ModelOverview]:
    """Those whose name is ``wanted`` or whose fingerprint begins with it; failing these, whose name contains it."""
    if wanted is None:
        return list(overviews)
    exact = [
        overview
        for overview in overviews
        if overview.model.model_name == wanted or overview.model.fingerprint.startswith(wanted)
    ]
    return exact or [overview for overview in overviews if wanted.lower() in overview.model.model_name.lower()]


def speed_text(announcement: Announcement) -> str:
    """The claimed speed in tokens per second."""
    speed = announcement.inference_tokens_per_s
    return "" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"
