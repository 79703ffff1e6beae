"""What a server keeps of a session: which columns its cache has, and which pages hold them."""

from __future__ import annotations

from collections.abc import Sequence

from petals_core.errors import CacheLostError
from petals_core.models.low_rank import Adapter
from petals_core.models.span import Span
from petals_server.cache.pages import CachePages, PageCopy
from petals_server.columns import ColumnLedger
from petals_server.deep_prompts import SessionPrompts


class SessionState:
    """A session's ledger and page tables. Changed with the engine's lock held, one step at a time."""

    def __init__(
        self,
        span: Span,
        pages: CachePages,
        *,
        num_rows: int,
        max_length: int,
        prompts: SessionPrompts | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        self.span = span
        self.adapters = adapters
        """What changes the span's layers for this session."""
        self.max_length = max_length
        self.prompts = prompts
        self.ledger = ColumnLedger(num_rows)
        self.pages = pages.open(num_rows)
        self.is_broken = False
        """A step failed half-way: what the cache holds is unknown, and the session has to end."""

    def begin(
        self, keep: int, order: Sequence[int] | None, row_tokens: Sequence[int]
    ) -> tuple[list[int], list[PageCopy]] | None:
        """Forget all columns but the first ``keep``, reorder the rows, and take pages for a step.

        Returns:
            The tokens of each row before the step, and the pages to be copied first; None if there are no pages now,
            in which case nothing has changed.

        Raises:
            CacheLostError: a sliding window has moved past what is to be kept.
        """
        lengths = self.ledger.count_within(keep)
        if not self.pages.can_go_back(lengths):
            raise CacheLostError(
                "blocks with a sliding window no longer have what lies so far back: the session has to be built again"
            )
        if order is not None and list(order) == list(range(len(order))):
            order = None
        if not self.pages.has_room(lengths, row_tokens, order):
            return None
        if keep < self.ledger.num_columns:
            self.ledger.crop(keep)
            self.pages.truncate(lengths)
        if order is not None:
            self.ledger.reorder(order)
            self.pages.reorder(order)
            lengths = [lengths[row] for row in order]
        copies = self.pages.grow(lengths, row_tokens)
        self.ledger.append(row_tokens)
        return lengths, copies

    def close(self) -> None:
        """Give all pages back; with the engine's lock held. Idempotent."""
        self.pages.close()
