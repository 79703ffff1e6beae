import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.errors import ProtocolError
from petals_core.wire.credit import ReceiveAccount, SendAccount, lane_of, message_cost
from petals_core.wire.frames import Priority


def test_the_cost_covers_payload_and_decoded_envelope() -> None:
    assert message_cost(100, 4096) == 256 + 1600 + 4096


def test_decode_steps_of_ordinary_size_have_a_lane_of_their_own() -> None:
    assert lane_of(Priority.DECODE, 1000, 1000) == 0
    assert lane_of(Priority.DECODE, 1001, 1000) == 1
    assert lane_of(Priority.BULK, 1, 1000) == 1
    assert lane_of(Priority.BACKGROUND, 1, 1000) == 1


def test_more_credit_than_is_outstanding_is_refused() -> None:
    account = SendAccount(100)
    account.outstanding_bytes += 50
    account.give_back(50)
    with pytest.raises(ProtocolError):
        account.give_back(1)


def test_a_message_that_begins_without_credit_is_refused() -> None:
    account = ReceiveAccount(100)
    account.begin(99)
    account.begin(1000)
    with pytest.raises(ProtocolError, match="without credit"):
        account.begin(1)


@given(st.integers(1, 1000), st.lists(st.tuples(st.booleans(), st.integers(1, 2000)), max_size=60))
def test_accounts_agree_stay_bounded_and_never_lock(credit_bytes: int, steps: list[tuple[bool, int]]) -> None:
    """True: a message begins if it may. False: the receiver takes the oldest one."""
    sender, receiver = SendAccount(credit_bytes), ReceiveAccount(credit_bytes)
    held: list[int] = []

    def take() -> None:
        receiver.taken(held.pop(0))
        if receiver.is_due:
            sender.give_back(receiver.collect())

    for begins, cost in steps:
        if begins and sender.is_open:
            sender.outstanding_bytes += cost
            receiver.begin(cost)
            held.append(cost)
            assert sum(held) < credit_bytes + cost
        elif held:
            take()
        assert sender.outstanding_bytes == receiver.outstanding_bytes
    while held:
        take()
    assert sender.is_open
