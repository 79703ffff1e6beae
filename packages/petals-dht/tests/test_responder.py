from __future__ import annotations

from petals_dht import messages
from petals_dht.contacts import Contact, model_key
from petals_dht.datagrams import MAX_BODY_BYTES
from petals_dht.messages import Find, FindNode, Found, Nodes, Ping, Pong, Store, Stored
from petals_dht.rates import Rate
from petals_dht.responder import NodeLimits, Responder, Tokens
from petals_dht.routing import RoutingTable
from petals_dht.storage import Storage
from petals_dht.testing import FINGERPRINT, make_announcement

NOW_S = 1_800_000_000.0
KEY = model_key(FINGERPRINT)
SOURCE = Contact(b"s" * 20, "192.0.2.1", 7)


def make_responder(*, host: str = "2001:db8::1", limits: NodeLimits | None = None) -> tuple[Responder, Storage]:
    """A node that knows 40 contacts."""
    storage, router = Storage(), RoutingTable(Contact(b"o" * 20, "", 1), 20)
    for number in range(40):
        router.add(Contact(bytes([number * 6]) * 20, host, number + 1))
    return Responder(storage, router, limits or NodeLimits(), Tokens(b"secret")), storage


def test_tokens_belong_to_a_host_and_grow_old() -> None:
    tokens = Tokens(b"secret")
    token = tokens.issue("192.0.2.1", at_s=1000)
    assert tokens.check(token, "192.0.2.1", at_s=1000 + 299)
    assert not tokens.check(token, "192.0.2.1", at_s=1000 + 600)
    assert not tokens.check(token, "192.0.2.2", at_s=1000)
    assert not Tokens(b"other").check(token, "192.0.2.1", at_s=1000)


def test_every_response_fits_a_datagram() -> None:
    for host in ("192.0.2.9", "2001:db8::1"):
        responder, storage = make_responder(host=host)
        for size in range(100):
            signed = make_announcement(now_s=NOW_S, public_name="x" * size, model_name="m" * 100)
            storage.store(KEY, signed.encoded, source_host="192.0.2.1", now_s=NOW_S)
        after, num_entries = None, 0
        for _ in range(200):
            found = responder.answer(SOURCE, Find(key=KEY, after=after), now_s=NOW_S, at_s=0)
            assert isinstance(found, Found)
            assert len(messages.encode(found)) <= MAX_BODY_BYTES
            assert (after is None) == bool(found.contacts_4 or found.contacts_6)
            num_entries += len(found.entries)
            after = found.next
            if after is None:
                break
        assert num_entries == 100
        nodes = responder.answer(SOURCE, FindNode(key=KEY), now_s=NOW_S, at_s=0)
        assert isinstance(nodes, Nodes)
        assert len(nodes.contacts_4) == 20 * 26 or len(nodes.contacts_6) == 20 * 38


def test_stores_are_limited_per_source() -> None:
    responder, storage = make_responder(limits=NodeLimits(store_rate=Rate(per_s=1, burst=1)))
    pong = responder.answer(SOURCE, Ping(), now_s=NOW_S, at_s=0)
    assert isinstance(pong, Pong)
    assert (pong.host, pong.port) == SOURCE.address
    outcomes = [
        responder.answer(
            SOURCE,
            Store(key=KEY, token=pong.token, entry=make_announcement(now_s=NOW_S).encoded),
            now_s=NOW_S,
            at_s=at_s,
        )
        for at_s in (0.0, 0.1, 1.2)
    ]
    refusal = Stored(is_kept=False, reason="too many announcements from this address")
    assert outcomes == [Stored(is_kept=True, total=1), refusal, Stored(is_kept=True, total=2)]
    assert storage.num_entries == 2
    forged = make_announcement(now_s=NOW_S).encoded.replace(b"test-model", b"best-model")
    outcome = responder.answer(SOURCE, Store(key=KEY, token=pong.token, entry=forged), now_s=NOW_S, at_s=10)
    assert outcome == Stored(is_kept=False, reason="the announcement's signature is not by its key", total=2)
