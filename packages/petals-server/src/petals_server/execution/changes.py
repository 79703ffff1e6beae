"""What sessions change in a span for their own tokens of a batch: deep prompts, adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from petals_core.models.low_rank import Adapter
from petals_core.models.span import Span
from petals_server.adapters import Part, adapted
from petals_server.deep_prompts import PromptedRow, SessionPrompts, prompted_rows
from petals_server.scheduling.plan import RowPart


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChange:
    """What the session of a row asks for."""

    prompts: SessionPrompts | None
    adapters: Sequence[Adapter]

    @property
    def is_empty(self) -> bool:
        return self.prompts is None and not self.adapters


@contextmanager
def changed(span: Span, rows: Sequence[RowPart], changes: Sequence[RowChange]) -> Iterator[None]:
    """Let the span compute a batch of these rows, in this order, each with what its session asks for."""
    if all(change.is_empty for change in changes):
        yield
        return
    prompted: list[PromptedRow] = []
    ranges: list[tuple[Sequence[Adapter], int, int]] = []
    start = 0
    for row, change in zip(rows, changes, strict=True):
        if change.prompts is not None:
            prompted.append(PromptedRow(prompts=change.prompts, start=start, past=row.past, count=row.count))
        end = start + row.count
        if ranges and ranges[-1][0] is change.adapters:  # another row of the same session
            ranges[-1] = (change.adapters, ranges[-1][1], end)
        else:
            ranges.append((change.adapters, start, end))
        start = end
    parts: list[Part] = [
        (adapter, None if len(ranges) == 1 else slice(first, end))
        for adapters, first, end in ranges
        for adapter in adapters
    ]
    with prompted_rows(span, prompted), adapted(span, parts):
        yield
