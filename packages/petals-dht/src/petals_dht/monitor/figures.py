"""Numbers as short texts, strips and sparklines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """The characters that figures are drawn with; each is one cell wide."""

    dark: str = "·"
    held: str = "▄"
    levels: str = "▁▂▃▄▅▆▇"
    """Without the full block, which would close the gap to the row above."""
    arrow: str = "→"
    dot: str = "·"
    up: str = "▲"
    down: str = "▼"
    cut: str = "…"
    warning: str = "▲"
    bad: str = "✖"
    good: str = "✔"


UNICODE = Glyphs()
ASCII = Glyphs(
    dark=".", held="#", levels="_.-~=+*#", arrow=">", dot="-", up="^", down="v", cut="~", warning="!", bad="X", good="+"
)
_SECONDS = (("d", 86_400.0), ("h", 3_600.0), ("m", 60.0))


def sparkline(samples: Sequence[float], width: int, glyphs: Glyphs) -> str:
    """The last samples as bars between 0 and the largest; several per character where there are more than ``width``.

    A character shows the mean of its samples. Fewer samples than characters give a shorter line.
    """
    if not samples or width < 1:
        return ""
    length = min(width, len(samples))
    bounds = [position * len(samples) // length for position in range(length + 1)]
    means = [sum(samples[start:end]) / (end - start) for start, end in pairwise(bounds)]
    top, highest = max(means), len(glyphs.levels) - 1
    # Anything above nothing is more than the lowest bar.
    return "".join(glyphs.levels[max(1, round(highest * mean / top)) if mean > 0 else 0] for mean in means)


def span_bar(start: int, end: int, num_blocks: int, width: int, glyphs: Glyphs) -> str:
    """Where blocks ``start:end`` lie within the model; at least one character of a span is filled."""
    width = min(width, num_blocks)
    first = start * width // num_blocks
    last = max(first + 1, -(-end * width // num_blocks))
    return glyphs.dark * first + glyphs.held * (last - first) + glyphs.dark * (width - last)


def ruler(num_blocks: int, width: int) -> str:
    """Block numbers under a strip of ``width`` characters, each beginning under its block."""
    width = min(width, num_blocks)
    line = ""
    for position in range(0, width, 10):
        label = str(position * num_blocks // width)
        if position + len(label) <= width:
            line = line.ljust(position) + label
    return line


def count_text(count: float | None) -> str:
    """At most five characters: ``950``, ``12.3k``, ``4.1M``; empty for None."""
    if count is None:
        return ""
    for unit, size in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        scaled = count / size
        if scaled < 99.95 and unit:
            return f"{scaled:.1f}{unit}"
        if round(scaled) < 1000:
            return f"{scaled:.0f}{unit}"
    return "huge"


def rate_text(rate: float | None) -> str:
    """A rate in at most five characters; small ones with a decimal."""
    if rate is None:
        return ""
    return f"{rate:.1f}" if 0 < rate < 9.95 else count_text(rate)


def delay_text(delay_s: float | None) -> str:
    """``0.4ms``, ``85ms``, ``2.5s``; empty for None."""
    if delay_s is None:
        return ""
    delay_ms = delay_s * 1e3
    if delay_ms < 9.95:
        return f"{delay_ms:.1f}ms"
    return f"{delay_ms:.0f}ms" if delay_ms < 999.5 else f"{delay_s:.1f}s"


def duration_text(duration_s: float) -> str:
    """``45s``, ``12m``, ``3h``, ``2d``: rounded down to one unit."""
    for unit, size_s in _SECONDS:
        if duration_s >= size_s:
            return f"{int(duration_s // size_s)}{unit}"
    return f"{max(0, int(duration_s))}s"


def work_text(block_s: float) -> str:
    """Blocks times time: ``12 block-h``, with decimals while it is little."""
    block_h = block_s / 3600
    return f"{block_h:.2f}" if block_h < 9.995 else count_text(block_h)
