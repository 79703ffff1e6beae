import pytest

from petals_core.errors import OverloadedError
from petals_core.identity import PeerId
from petals_server.config import ServerLimits
from petals_server.sessions import SessionTable

ALICE, BOB = PeerId(b"a" * 32), PeerId(b"b" * 32)


def test_room_is_set_aside_and_given_back() -> None:
    table = SessionTable(cache_tokens=100, limits=ServerLimits())
    first = table.open(ALICE, num_rows=2, max_length=30)
    assert (len(table), table.cache_tokens_left) == (1, 40)
    with pytest.raises(OverloadedError, match="60 tokens of attention cache and 40 of 100") as refusal:
        table.open(BOB, num_rows=2, max_length=30)
    assert refusal.value.retry_after_s == ServerLimits().retry_after_s
    assert (len(table), table.cache_tokens_left) == (1, 40)
    table.open(BOB, num_rows=1, max_length=40)
    table.close(first)
    assert (len(table), table.cache_tokens_left) == (1, 60)


def test_recurrent_states_take_room_for_each_row() -> None:
    table = SessionTable(cache_tokens=100, limits=ServerLimits(), state_tokens=7)
    table.close(table.open(ALICE, num_rows=2, max_length=30))
    table.open(ALICE, num_rows=2, max_length=30)
    assert table.cache_tokens_left == 100 - 2 * 37


def test_one_peer_can_not_take_all_sessions() -> None:
    table = SessionTable(cache_tokens=100, limits=ServerLimits(max_sessions_per_peer=2, max_sessions=3))
    sessions = [table.open(ALICE, num_rows=1, max_length=1) for _ in range(2)]
    with pytest.raises(OverloadedError, match="2 sessions open here"):
        table.open(ALICE, num_rows=1, max_length=1)
    table.open(BOB, num_rows=1, max_length=1)
    with pytest.raises(OverloadedError, match="3 sessions"):
        table.open(BOB, num_rows=1, max_length=1)
    table.close(sessions[0])
    table.open(ALICE, num_rows=1, max_length=1)


def test_a_session_is_closed_once() -> None:
    table = SessionTable(cache_tokens=10, limits=ServerLimits())
    session = table.open(ALICE, num_rows=1, max_length=1)
    table.close(session)
    with pytest.raises(KeyError):
        table.close(session)
