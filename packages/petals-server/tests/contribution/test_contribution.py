from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.errors import InvalidRequestError, OverloadedError
from petals_core.identity import Identity
from petals_core.net.rpc import call
from petals_core.receipts import MAX_AGE_S, Receipt, Statement, endorse, read_endorsement
from petals_core.testing.network import run_clean
from petals_core.wire.messages import Contribution, ContributionNoted
from petals_server.comfort.ledger import ServedLedger
from petals_server.contribution.book import MAX_RECEIPTS, ReceiptBook
from petals_server.contribution.desk import ContributionDesk
from petals_server.contribution.weights import MAX_PER_CLIENT, MAX_WEIGHT, count_given, weigh, weighted_median
from petals_server.testing import TIMEOUT_S, Client, random_states, served

SERVER, CLIENT, OTHER = (Identity.ephemeral() for _ in range(3))


def signed(
    block_tokens: int = 100, server: Identity = SERVER, client: Identity = CLIENT, signed_at_s: float | None = None
) -> Receipt:
    """The client's half of a receipt."""
    statement = Statement(
        server_key=server.public_key,
        client_key=client.public_key,
        nonce=os.urandom(16),
        block_tokens=block_tokens,
        signed_at_s=time.time() if signed_at_s is None else signed_at_s,
    )
    return Receipt.sign(statement, client)


def test_a_receipt_is_of_both() -> None:
    half = signed()
    assert Receipt.decode(half.encoded, now_s=time.time()) == half
    whole = half.countersign(SERVER)
    read = Receipt.decode(whole.encoded, now_s=time.time())
    assert read == whole
    assert (read.client_id, read.server_id) == (CLIENT.peer_id, SERVER.peer_id)
    with pytest.raises(InvalidRequestError, match="another server"):
        half.countersign(OTHER)


@given(st.data())
def test_a_receipt_that_was_changed_is_refused(data: st.DataObject) -> None:
    encoded = bytearray(signed(signed_at_s=1e9).countersign(SERVER).encoded)
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidRequestError):
        Receipt.decode(bytes(encoded), now_s=1e9)


@pytest.mark.parametrize("receipt", [signed(signed_at_s=1.0), signed(client=SERVER), signed(signed_at_s=9e10)])
def test_receipts_that_count_for_nothing(receipt: Receipt) -> None:
    with pytest.raises(InvalidRequestError):
        Receipt.decode(receipt.encoded, now_s=MAX_AGE_S + 100)


def test_an_endorsement_is_for_one_client() -> None:
    word = endorse(SERVER, CLIENT.peer_id)
    assert read_endorsement(word, CLIENT.peer_id) == SERVER.peer_id
    with pytest.raises(InvalidRequestError):
        read_endorsement(word, OTHER.peer_id)


def test_invented_clients_count_as_one() -> None:
    invented = [signed(MAX_PER_CLIENT, client=Identity.ephemeral()).countersign(SERVER) for _ in range(5)]
    assert count_given(invented, ()) == MAX_PER_CLIENT
    assert count_given([*invented, invented[0]], {invented[0].client_id}) == 2 * MAX_PER_CLIENT
    assert count_given([signed(7)], ()) == 0  # with one signature only


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(1, 10**9))
def test_weights_are_bounded_and_grow_with_what_was_given(given_: int, taken: int, more: int) -> None:
    assert 1.0 <= weigh(given_, taken) <= weigh(given_ + more, taken) <= MAX_WEIGHT
    assert weigh(given_, taken + more) <= weigh(given_, taken)
    assert weigh(0, taken) == 1.0


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1))
def test_less_than_half_of_the_weight_decides_nothing_alone(values: list[tuple[float, int]]) -> None:
    median = weighted_median(values)
    total = sum(weight for _, weight in values)
    assert 2 * sum(weight for value, weight in values if value < median) <= total
    assert 2 * sum(weight for value, weight in values if value > median) <= total


def test_votes_count_by_what_was_computed_for_the_voter() -> None:
    ledger = ServedLedger()
    desk = ContributionDesk(SERVER, ledger, ReceiptBook(None), prefers=False)
    server, now_s = OTHER.peer_id.digest[:8], time.time()
    desk._note_vote(server, CLIENT.peer_id, 0.9, now_s)
    assert desk.votes == {}  # nothing was computed for it
    ledger.note(CLIENT.peer_id, num_tokens=1000, num_blocks=10)
    desk._note_vote(server, CLIENT.peer_id, 0.9, now_s)
    for _ in range(10):
        liar = Identity.ephemeral().peer_id
        ledger.note(liar, num_tokens=10, num_blocks=10)
        desk._note_vote(server, liar, 0.0, now_s)
    assert desk.votes == {server: 0.9}
    desk._note_vote(server, CLIENT.peer_id, 0.9, now_s - 3600)
    assert desk.votes == {server: 0.0}  # old votes count no more


def test_verifying_is_bounded() -> None:
    desk = ContributionDesk(SERVER, ServedLedger(), ReceiptBook(None), prefers=True)
    for _ in range(2):
        desk._admit(CLIENT.peer_id, 129)
    with pytest.raises(OverloadedError):
        desk._admit(CLIENT.peer_id, 129)
    desk._admit(OTHER.peer_id, 129)


def test_the_book_is_kept_and_what_is_wrong_in_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "receipts.bin"
    book = ReceiptBook(path)
    receipts = [signed(number + 1).countersign(SERVER) for number in range(3)]
    for receipt in receipts:
        book.add(receipt)
    assert ReceiptBook(path).receipts == receipts
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content[:-5])
    assert ReceiptBook(path).receipts == [receipts[1]]
    assert ReceiptBook(tmp_path / "missing").receipts == []
    assert MAX_RECEIPTS <= 10_000


def test_a_server_signs_for_what_it_computed_and_prefers_who_gave(checkpoint: Path) -> None:
    async def tell(client: Client, message: Contribution) -> ContributionNoted:
        reply = await call(client.connection, message, reply=ContributionNoted, timeout_s=TIMEOUT_S)
        assert isinstance(reply.body, ContributionNoted)
        return reply.body

    async def run() -> None:
        async with served(checkpoint, prefer_contributors=True) as client:
            server, own = client.server._identity, client.identity
            await client.forward([random_states(1, 5)[0]])
            receipt = signed(20, server=server, client=own)
            noted = await tell(client, Contribution(receipt=receipt.encoded))
            assert noted.weight == 1.0
            assert noted.receipt is not None
            assert Receipt.decode(noted.receipt, now_s=time.time()).server_signature is not None
            assert client.server._desk._book.receipts[0].statement == receipt.statement
            for wrong in (
                receipt.encoded,  # once more
                signed(20, server=server).encoded,  # by another client
                signed(1, server=OTHER, client=own).encoded,
                b"garbage",
            ):
                with pytest.raises(InvalidRequestError):
                    await tell(client, Contribution(receipt=wrong))
            given_ = tuple(signed(10_000_000, server=OTHER).countersign(OTHER).encoded for _ in range(2))
            word = endorse(OTHER, own.peer_id)
            noted = await tell(client, Contribution(endorsement=word, given=given_))
            assert noted.weight > 3
            assert client.server._desk.weight(own.peer_id) == noted.weight
            assert client.server._desk.weight(CLIENT.peer_id) == 1.0
            with pytest.raises(InvalidRequestError):
                await tell(client, Contribution(endorsement=endorse(SERVER, own.peer_id), given=given_))
            observed = ((OTHER.peer_id.digest[:8], 30),)
            await tell(client, Contribution(observed=observed))
            assert client.server._desk.votes == {OTHER.peer_id.digest[:8]: 0.3}
            now_s = time.time()
            assert client.server._describe(now_s, now_s + 60).observed == observed

    run_clean(run())
