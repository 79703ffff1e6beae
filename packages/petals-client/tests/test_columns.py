"""Columns of a user and of the servers tell of the same tokens, whatever is appended, cut and reordered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_client.columns import ColumnMap
from petals_core.errors import InvalidRequestError

R = 3
masks = st.integers(1, 5).flatmap(
    lambda width: st.tuples(st.just(width), st.one_of(st.none(), st.tuples(*[st.integers(0, (1 << width) - 1)] * R)))
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("append"), masks),
        st.tuples(st.just("truncate"), st.floats(0, 1)),
        st.tuples(st.just("reorder"), st.tuples(*[st.integers(0, R - 1)] * R)),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(actions)
def test_against_rows_of_named_tokens(drawn: list[tuple[str, object]]) -> None:
    """``user`` has a name or None per column; ``server`` is rebuilt as the wire's words say it."""
    columns = ColumnMap(R)
    user: list[list[int | None]] = [[] for _ in range(R)]
    server: list[list[int | None]] = [[] for _ in range(R)]
    name = 0
    for action, value in drawn:
        if action == "append":
            width, bits = value  # type: ignore[misc]
            columns.append(width, bits)
            news: list[list[int]] = []
            for row in range(R):
                new: list[int] = []
                for column in range(width):
                    is_token = bits is None or bits[row] >> column & 1
                    name += 1
                    user[row].append(name if is_token else None)
                    if is_token:
                        new.append(name)
                news.append(new)
            most = max(map(len, news))
            for row in range(R):
                server[row] += [None] * (most - len(news[row])) + news[row]
        elif action == "truncate":
            length = round(value * columns.length)  # type: ignore[operator]
            before = (columns.length, columns.server_length, columns.masks(), list(columns.row_lengths))
            try:
                columns.truncate(length)
            except InvalidRequestError:
                assert before == (columns.length, columns.server_length, columns.masks(), columns.row_lengths)
                continue
            user = [row[:length] for row in user]
            server = [row[: columns.server_length] for row in server]
        else:
            columns.reorder(value)  # type: ignore[arg-type]
            user = [list(user[row]) for row in value]  # type: ignore[attr-defined]
            server = [list(server[row]) for row in value]  # type: ignore[attr-defined]
        assert columns.length == len(user[0])
        assert columns.server_length == len(server[0])
        tokens = [[token for token in row if token is not None] for row in user]
        assert [[token for token in row if token is not None] for row in server] == tokens
        assert columns.row_lengths == list(map(len, tokens))
        bits = columns.masks()
        expected = tuple(sum((token is not None) << i for i, token in enumerate(row)) for row in user)
        assert bits == (None if all(None not in row for row in user) else expected)


def test_left_pads_can_be_cut_anywhere() -> None:
    for length in range(5):
        columns = ColumnMap(2)
        columns.append(4, (0b1111, 0b1100))
        columns.truncate(length)
        assert columns.server_length == length
        assert columns.row_lengths == [length, max(0, length - 2)]


def test_right_pads_can_be_cut_only_around_the_step() -> None:
    columns = ColumnMap(2)
    columns.append(4, (0b1111, 0b0011))
    columns.append(2)
    with pytest.raises(InvalidRequestError, match="pads on the right"):
        columns.truncate(3)
    columns.truncate(4)
    assert columns.server_length == 4
    columns.truncate(0)
    assert columns.server_length == 0
