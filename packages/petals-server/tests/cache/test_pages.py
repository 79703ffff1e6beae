"""Pages are conserved, and every row finds in its pages what was written for it, whatever others do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from petals_server.cache.pages import (
    WINDOW_SLACK_TOKENS,
    CachePages,
    PageGroup,
    PagePool,
    PageRun,
    SessionPages,
    plan_groups,
)

PAGE_TOKENS = 4
WINDOWS = (None, 3, 10)


def place(run: PageRun, token: int) -> tuple[int, int]:
    """The page and the place in it that hold a row's token."""
    index, offset = divmod(token - run.first_token, PAGE_TOKENS)
    return (run.pages[0] + index if run.is_consecutive else run.pages[index]), offset


class Server(RuleBasedStateMachine):
    """Sessions that grow, go back, fork and end; each token is written as a number that no other has."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.sessions: list[tuple[SessionPages, list[list[int]]]] = []
        self.content: dict[tuple[int, int, int], int] = {}

    @initialize(num_pages=st.integers(4, 40))
    def start(self, num_pages: int) -> None:
        self.pages = CachePages(
            [PageGroup(window=window, num_pages=num_pages) for window in WINDOWS], page_tokens=PAGE_TOKENS
        )

    @rule(num_rows=st.integers(1, 3))
    def open(self, num_rows: int) -> None:
        if len(self.sessions) < 4:
            self.sessions.append((self.pages.open(num_rows), [[] for _ in range(num_rows)]))

    @rule(data=st.data())
    def step(self, data: Any) -> None:
        if not self.sessions:
            return
        session, rows = data.draw(st.sampled_from(self.sessions))
        lengths = [data.draw(st.integers(max(0, len(row) - 90), len(row))) for row in rows]
        counts = [data.draw(st.integers(0, 45)) for _ in rows]
        order = data.draw(st.none() | st.lists(st.integers(0, len(rows) - 1), min_size=len(rows), max_size=len(rows)))
        if not session.can_go_back(lengths):
            assert any(len(row) - length > WINDOW_SLACK_TOKENS for row, length in zip(rows, lengths, strict=True))
            return
        free = [pool.num_free for pool in self.pages.pools]
        if not session.has_room(lengths, counts, order):
            assert free == [pool.num_free for pool in self.pages.pools]
            return
        session.truncate(lengths)
        kept = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        if order is not None:
            session.reorder(order)
            kept = [list(kept[row]) for row in order]
        rows[:] = kept
        copies = session.grow([len(row) for row in rows], counts)
        for row, count in enumerate(counts):
            while count:
                part = min(count, 7)
                windowed = session.grow_window(row, len(rows[row]), part)
                if windowed is None:  # rows of the other groups have their pages; nobody reads them
                    rows[row] += self.write(row, session, rows[row], 0, copies)
                    session.truncate([len(each) for each in rows])
                    return
                rows[row] += self.write(row, session, rows[row], part, [*copies, *windowed])
                copies = []
                session.slide(row, len(rows[row]))
                count -= part

    @rule(data=st.data())
    def next_token(self, data: Any) -> None:
        """A token that has its place takes no page, and finds the row's pages where they were."""
        if not self.sessions:
            return
        session, rows = data.draw(st.sampled_from(self.sessions))
        row = data.draw(st.integers(0, len(rows) - 1))
        if len(rows) > 1 or not session.has_place(row, len(rows[row])):
            return
        runs = session.runs(row)
        assert session.has_room([len(rows[row])], [1], None)
        assert not session.grow([len(rows[row])], [1])
        assert session.grow_window(row, len(rows[row]), 1) == []
        assert session.runs(row) == runs
        rows[row] += self.write(row, session, rows[row], 1, [])
        session.slide(row, len(rows[row]))

    def write(self, row: int, session: SessionPages, before: list[int], count: int, copies: list[Any]) -> list[int]:
        pages = {(copy.group, copy.target): copy.source for copy in copies}
        copied = {
            (group, target, offset): self.content[group, source, offset]
            for (group, target), source in pages.items()
            for offset in range(PAGE_TOKENS)
            if (group, source, offset) in self.content
        }
        self.content.update(copied)
        tokens = list(range(self.written, self.written + count))
        self.written += count
        for group, run in enumerate(session.runs(row)):
            for index, token in enumerate(tokens, len(before)):
                self.content[group, *place(run, index)] = token
        return tokens

    @rule(data=st.data())
    def close(self, data: Any) -> None:
        if self.sessions:
            session, _ = self.sessions.pop(data.draw(st.integers(0, len(self.sessions) - 1)))
            session.close()
            session.close()

    @invariant()
    def rows_find_what_was_written_for_them(self) -> None:
        for session, rows in self.sessions:
            for row, tokens in enumerate(rows):
                for group, (run, window) in enumerate(zip(session.runs(row), WINDOWS, strict=True)):
                    first = 0 if window is None else max(0, len(tokens) - window + 1)
                    for index in range(first, len(tokens)):
                        assert self.content[group, *place(run, index)] == tokens[index]

    @invariant()
    def pages_are_conserved(self) -> None:
        if hasattr(self, "pages"):
            for pool in self.pages.pools:
                assert pool.num_free + pool.num_held == pool.num_pages
            if not self.sessions:
                assert self.pages.num_held == 0

    def teardown(self) -> None:
        for session, _ in self.sessions:
            session.close()
        if hasattr(self, "pages"):
            assert self.pages.num_held == 0


TestServer = Server.TestCase
TestServer.settings = settings(max_examples=40, stateful_step_count=25)


def test_a_window_keeps_itself_and_what_may_be_taken_back() -> None:
    pages = CachePages([PageGroup(window=8, num_pages=100)], page_tokens=PAGE_TOKENS)
    session = pages.open(1)
    for past in range(400):
        assert session.grow_window(0, past, 1) is not None
        session.slide(0, past + 1)
        assert pages.num_held <= -(-(8 + WINDOW_SLACK_TOKENS) // PAGE_TOKENS) + 1
    assert session.can_go_back([400 - WINDOW_SLACK_TOKENS])
    assert not session.can_go_back([300])
    assert session.can_go_back([0])


def test_rows_of_a_beam_share_pages_until_they_write() -> None:
    pages = CachePages([PageGroup(window=None, num_pages=100)], page_tokens=PAGE_TOKENS)
    session = pages.open(3)
    session.grow([0, 0, 0], [10, 0, 0])
    assert pages.num_held == 3
    session.reorder([0, 0, 0])
    assert pages.num_held == 3
    copies = session.grow([10, 10, 10], [1, 1, 1])
    assert (pages.num_held, len(copies)) == (5, 2)  # the last to write has the page for itself
    session.truncate([8, 8, 8])
    assert pages.num_held == 2


def test_first_pages_have_room_to_grow() -> None:
    pool = PagePool(100)
    first = [pool.take(None)]
    second = [pool.take(None)]
    for _ in range(40):
        first.append(pool.take(first[-1]))
        second.append(pool.take(second[-1]))
    assert first == list(range(first[0], first[0] + 41))
    assert second == list(range(second[0], second[0] + 41))


@pytest.mark.parametrize(("windows", "expected"), [([None, None], [None]), ([4, None, 2, 4], [None, 2, 4]), ([8], [8])])
def test_blocks_that_forget_alike_share_a_group(windows: list[int | None], expected: list[int | None]) -> None:
    groups = plan_groups(windows, num_tokens=100, page_tokens=16)
    assert [group.window for group in groups] == expected
    assert {group.num_pages for group in groups} == {7}


def test_rows_of_blocks_that_all_forget_have_a_bound() -> None:
    groups = plan_groups([8, 4], num_tokens=1000, page_tokens=16)
    assert CachePages(groups, page_tokens=16).max_row_tokens(32) == 8 + WINDOW_SLACK_TOKENS + 32 + 16
    assert (
        CachePages(plan_groups([8, None], num_tokens=1000, page_tokens=16), page_tokens=16).max_row_tokens(32) is None
    )
