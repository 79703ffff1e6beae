"""Which session holds which pages of the attention cache. No tensors here: a page is a number.

Blocks that forget alike share a *group*: one for blocks that attend to everything, one for each length of window. A row
has one table of pages per group; page ``i`` of it holds the row's tokens ``i * page_tokens`` up to ``(i + 1) *
page_tokens``, of every block of the group. Rows of a beam share the pages of their common tokens; a page that several
rows hold is copied before one of them writes to it. Page 0 of every pool belongs to nobody and is always zero: it
stands wherever a batch needs a page that nobody wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

WINDOW_SLACK_TOKENS: Final = 64
"""Tokens that are kept behind a window, so that taking back that many costs nothing."""
_FREE_RUNS: Final = re.compile(rb"\x01+")


class PagePool:
    """The pages of one group. ``num_free + num_held == num_pages`` after every operation."""

    def __init__(self, num_pages: int) -> None:
        """``num_pages``: those that sessions may hold; page 0 comes on top."""
        assert num_pages >= 0
        self.num_pages = num_pages
        self._holders = [0] * (num_pages + 1)
        self._is_free = bytearray(b"\x00" + b"\x01" * num_pages)
        self.num_free = num_pages

    @property
    def num_held(self) -> int:
        """Pages that somebody holds."""
        return sum(1 for holders in self._holders if holders)

    def holders(self, page: int) -> int:
        """How many tables have the page."""
        return self._holders[page]

    def take(self, after: int | None) -> int:
        """Hand out a free page: the one behind ``after`` where possible, so that tables stay in one piece.

        A table's first page comes from the middle of the largest gap, where it has most room to grow.
        """
        assert self.num_free > 0, "the caller has to see that there is a page"
        if after is not None and after < self.num_pages and self._is_free[after + 1]:
            page = after + 1
        else:
            gap = max(_FREE_RUNS.finditer(self._is_free), key=lambda match: match.end() - match.start())
            first, end = gap.span()
            page = first if first == 1 else first + (end - first) // 2
        self._is_free[page] = 0
        self._holders[page] = 1
        self.num_free -= 1
        return page

    def share(self, page: int) -> None:
        """Let another table have a page that is held already."""
        assert self._holders[page] > 0
        self._holders[page] += 1

    def give_back(self, page: int) -> None:
        """Let one of a page's holders go; the last one frees it."""
        assert self._holders[page] > 0
        self._holders[page] -= 1
        if not self._holders[page]:
            self._is_free[page] = 1
            self.num_free += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCopy:
    """A page whose content has to be copied before anything is written."""

    group: int
    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRun:
    """The pages of a row in one group, as they are while a turn is computed."""

    first_token: int
    """What the first page holds first; pages of earlier tokens were given back."""
    pages: tuple[int, ...]
    """All of them, or the first alone where the others follow it in the pool."""
    is_consecutive: bool


class PageTable:
    """The pages of one row in one group."""

    def __init__(self, pool: PagePool, page_tokens: int, window: int | None) -> None:
        self._pool = pool
        self._page_tokens = page_tokens
        self._window = window
        self._num_dropped = 0
        """Pages at the front that left the window."""
        self._pages: list[int] = []
        self._is_consecutive = True

    @property
    def num_pages(self) -> int:
        return len(self._pages)

    @property
    def first_token(self) -> int:
        """The first token that is still held."""
        return self._num_dropped * self._page_tokens

    def can_go_back(self, num_tokens: int) -> bool:
        """Whether a token behind the first ``num_tokens`` would find all that its window shows it."""
        return self._window is None or not num_tokens or self.first_token <= max(0, num_tokens - self._window + 1)

    def num_needed(self, kept: int, count: int) -> int:
        """Free pages that it takes at most to keep ``kept`` tokens and append ``count``; those it gives back count."""
        kept_pages = self._count(kept) - self._num_dropped if kept else 0
        needed = self._count(kept + count) - self._count(kept)
        needed -= sum(1 for page in self._pages[kept_pages:] if self._pool.holders(page) == 1)
        if count and kept % self._page_tokens and self._pool.holders(self._pages[kept_pages - 1]) > 1:
            needed += 1
        return needed

    def truncate(self, num_tokens: int) -> None:
        """Keep the pages of the first ``num_tokens`` tokens and give the others back."""
        if not num_tokens:
            self.close()
            return
        kept = self._count(num_tokens) - self._num_dropped
        assert kept >= 0
        for page in self._pages[kept:]:
            self._pool.give_back(page)
        del self._pages[kept:]
        if not self._pages:
            self._is_consecutive = True

    def has_place(self, past: int) -> bool:
        """Whether the token behind ``past`` goes to the last page, which nobody else holds."""
        return past % self._page_tokens != 0 and self._pool.holders(self._pages[-1]) == 1

    def grow(self, past: int, count: int) -> tuple[int, int] | None:
        """Take pages for ``count`` tokens behind ``past``; the pool must have them.

        Returns:
            The (source, target) of a page that other rows hold as well and that now has a copy of its own.
        """
        copied = None
        if past % self._page_tokens and self._pool.holders(source := self._pages[-1]) > 1:
            target = self._pool.take(self._pages[-2] if len(self._pages) > 1 else None)
            self._pool.give_back(source)
            self._pages[-1] = target
            self._check_consecutive()
            copied = (source, target)
        for _ in range(self._count(past + count) - self._num_dropped - len(self._pages)):
            last = self._pages[-1] if self._pages else None
            page = self._pool.take(last)
            self._is_consecutive = self._is_consecutive and (last is None or page == last + 1)
            self._pages.append(page)
        return copied

    def slide(self, num_tokens: int) -> None:
        """Give back what no token behind ``num_tokens`` will see, nor behind somewhat fewer."""
        if self._window is None:
            return
        unseen = (num_tokens - self._window + 1 - WINDOW_SLACK_TOKENS) // self._page_tokens - self._num_dropped
        if unseen > 0:
            for page in self._pages[:unseen]:
                self._pool.give_back(page)
            del self._pages[:unseen]
            self._num_dropped += unseen
            if not self._is_consecutive:
                self._check_consecutive()

    def fork(self) -> PageTable:
        """A table with the same pages, held once more."""
        twin = PageTable(self._pool, self._page_tokens, self._window)
        twin._num_dropped = self._num_dropped
        twin._pages = self._pages.copy()
        twin._is_consecutive = self._is_consecutive
        for page in self._pages:
            self._pool.share(page)
        return twin

    def close(self) -> None:
        """Give everything back."""
        for page in self._pages:
            self._pool.give_back(page)
        self._pages.clear()
        self._num_dropped = 0
        self._is_consecutive = True

    def run(self) -> PageRun:
        """The pages as a value."""
        pages = self._pages[:1] if self._is_consecutive else self._pages
        return PageRun(first_token=self.first_token, pages=tuple(pages), is_consecutive=self._is_consecutive)

    def _count(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def _check_consecutive(self) -> None:
        first = self._pages[0] if self._pages else 0
        self._is_consecutive = self._pages == list(range(first, first + len(self._pages)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroup:
    """Blocks that forget alike."""

    window: int | None
    """Tokens that a token sees, itself included; None: all."""
    num_pages: int


class CachePages:
    """All pools of a server."""

    def __init__(self, groups: Sequence[PageGroup], *, page_tokens: int) -> None:
        self.groups = tuple(groups)
        self.page_tokens = page_tokens
        self.pools = tuple(PagePool(group.num_pages) for group in groups)
        self.is_windowed = any(group.window is not None for group in groups)
        """Whether some blocks forget."""

    @property
    def num_held(self) -> int:
        """Pages of all pools that sessions hold."""
        return sum(pool.num_pages - pool.num_free for pool in self.pools)

    def max_row_tokens(self, max_turn_tokens: int) -> int | None:
        """Tokens that a row holds at most, however long it is; None where some blocks keep everything."""
        windows = [group.window for group in self.groups if group.window is not None]
        if len(windows) < len(self.groups):
            return None
        return max(windows) + WINDOW_SLACK_TOKENS + max_turn_tokens + self.page_tokens

    def open(self, num_rows: int) -> SessionPages:
        """Tables for the rows of a new session; they hold nothing yet."""
        return SessionPages(self, num_rows)


class SessionPages:
    """The page tables of a session's rows."""

    def __init__(self, pages: CachePages, num_rows: int) -> None:
        self._pages = pages
        self._rows = [
            [
                PageTable(pool, pages.page_tokens, group.window)
                for pool, group in zip(pages.pools, pages.groups, strict=True)
            ]
            for _ in range(num_rows)
        ]
        self._runs: dict[int, tuple[PageRun, ...]] = {}
        """Of rows whose pages have not changed since."""
        self.is_closed = False

    def can_go_back(self, lengths: Sequence[int]) -> bool:
        """Whether each row still has all that tokens behind its first ``lengths`` would see."""
        return all(
            table.can_go_back(length) for tables, length in zip(self._rows, lengths, strict=True) for table in tables
        )

    def has_room(self, lengths: Sequence[int], counts: Sequence[int], order: Sequence[int] | None) -> bool:
        """Whether the pools have pages for a step: keep ``lengths`` tokens of the rows, reorder, append ``counts``.

        ``lengths`` are those of the rows before they are reordered. Nothing is changed. With an order the answer is
        careful: pages that reordering would free do not count. Of a window only a page per row is asked for, since the
        others come and go while the step is computed.
        """
        page_tokens = self._pages.page_tokens
        for index, (pool, group) in enumerate(zip(self._pages.pools, self._pages.groups, strict=True)):
            if group.window is not None:
                counts = [min(count, page_tokens) for count in counts]
            if order is None:
                needed = sum(
                    tables[index].num_needed(length, count)
                    for tables, length, count in zip(self._rows, lengths, counts, strict=True)
                )
            else:
                needed = 0
                for row, count in zip(order, counts, strict=True):
                    length = lengths[row]
                    needed += -(-(length + count) // page_tokens) - -(-length // page_tokens)
                    needed += 1 if count and length % page_tokens else 0
            if needed > pool.num_free:
                return False
        return True

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first ``lengths`` tokens of each row."""
        self._runs.clear()
        for tables, length in zip(self._rows, lengths, strict=True):
            for table in tables:
                table.truncate(length)

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i be what row ``order[i]`` was, sharing its pages."""
        rows = [[table.fork() for table in self._rows[row]] for row in order]
        for tables in self._rows:
            for table in tables:
                table.close()
        self._rows = rows
        self._runs.clear()

    def grow(self, lengths: Sequence[int], counts: Sequence[int]) -> list[PageCopy]:
        """Take pages for ``counts`` tokens behind each row's ``lengths`` in the groups that keep everything.

        To be called once in a step, for which there is room. Returns what has to be copied first.
        """
        copies = []
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            if count:
                copies += self._grow(row, length, count, is_windowed=False)
        return copies

    def has_place(self, row: int, past: int) -> bool:
        """Whether a row's token behind ``past`` others, which is all that it has, takes no new page."""
        return all(table.has_place(past) for table in self._rows[row])

    def grow_window(self, row: int, past: int, count: int) -> list[PageCopy] | None:
        """Take pages for the next ``count`` tokens of a row in the groups that have windows; None: there are none."""
        for index, (pool, group) in enumerate(zip(self._pages.pools, self._pages.groups, strict=True)):
            if group.window is not None and self._rows[row][index].num_needed(past, count) > pool.num_free:
                return None
        return self._grow(row, past, count, is_windowed=True)

    def _grow(self, row: int, past: int, count: int, *, is_windowed: bool) -> list[PageCopy]:
        copies = []
        self._runs.pop(row, None)
        for index, group in enumerate(self._pages.groups):
            if (group.window is not None) is is_windowed:
                copied = self._rows[row][index].grow(past, count)
                if copied is not None:
                    copies.append(PageCopy(group=index, source=copied[0], target=copied[1]))
        return copies

    def slide(self, row: int, num_tokens: int) -> None:
        """Give back what leaves the windows of a row that has ``num_tokens`` tokens computed."""
        if self._pages.is_windowed:
            self._runs.pop(row, None)
            for table in self._rows[row]:
                table.slide(num_tokens)

    def runs(self, row: int) -> tuple[PageRun, ...]:
        """A row's pages in each group, as values; the same object as long as they stay the same."""
        runs = self._runs.get(row)
        if runs is None:
            runs = self._runs[row] = tuple(table.run() for table in self._rows[row])
        return runs

    def close(self) -> None:
        """Give everything back; idempotent."""
        self.is_closed = True
        self._runs.clear()
        for tables in self._rows:
            for table in tables:
                table.close()


def plan_groups(windows: Iterable[int | None], *, num_tokens: int, page_tokens: int) -> list[PageGroup]:
    """Groups for blocks with these windows, the one that keeps everything first, with ``num_tokens`` tokens each.

    Pools of windows are as large as that of the others, because sessions shorter than the window need as much of both.
    """
    num_pages = max(1, -(-num_tokens // page_tokens))
    ordered = sorted(set(windows), key=lambda window: (window is not None, window or 0))
    return [PageGroup(window=window, num_pages=num_pages) for window in ordered]
