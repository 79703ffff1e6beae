from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals_dht.contacts import Contact, distance
from petals_dht.routing import RoutingTable

OWN = Contact(b"\x00" * 20, "", 1)
ids = st.binary(min_size=20, max_size=20).filter(lambda id_: id_ != OWN.id)
MIDPOINT = (2**160 // 2).to_bytes(20, "big")


def fill(contact_ids: list[bytes], bucket_size: int = 4) -> RoutingTable:
    table = RoutingTable(OWN, bucket_size)
    for number, contact_id in enumerate(contact_ids):
        table.add(Contact(contact_id, "192.0.2.1", number + 1))
    return table


@given(st.lists(ids | st.integers(0, 40).map(lambda shift: (2**160 - 1 >> shift).to_bytes(20, "big")), unique=True))
def test_every_contact_has_one_bucket(contact_ids: list[bytes]) -> None:
    table = fill(contact_ids)
    for contact in table.contacts():
        holders = [bucket for bucket in table.buckets if bucket[contact.id] is not None]
        assert len(holders) == 1
        assert holders[0].has_in_range(contact)
    assert len({contact.id for contact in table.contacts()}) == len(table)


def test_a_midpoint_has_one_bucket() -> None:
    others = [(2**159 + offset).to_bytes(20, "big") for offset in range(1, 6)] + [
        bytes([0, number]) + bytes(18) for number in range(1, 6)
    ]
    table = fill([MIDPOINT, *others])
    table.add(Contact(MIDPOINT, "192.0.2.1", 1))
    assert sum(bucket[MIDPOINT] is not None for bucket in table.buckets) == 1
    assert table.get(MIDPOINT) is not None


@given(st.lists(ids, unique=True, max_size=60), ids, st.integers(1, 20))
def test_nearest_is_exact(contact_ids: list[bytes], key: bytes, count: int) -> None:
    table = fill(contact_ids)
    known = sorted(table.contacts(), key=lambda contact: distance(contact.id, key))
    assert table.nearest(key, count) == known[:count]
    if known:
        assert table.nearest(key, count, without=known[0].id) == known[1 : count + 1]


def test_a_full_bucket_names_its_most_silent_contact() -> None:
    far = [bytes([0xF0]) + number.to_bytes(19, "big") for number in range(5)]
    table = RoutingTable(OWN, 4)
    table.buckets[0].depth = lambda: 5
    for number, contact_id in enumerate(far[:4]):
        assert table.add(Contact(contact_id, "192.0.2.1", number + 1)) is None
    # The one bucket holds this node itself and splits; the far half then is full, at a depth where it stays whole.
    near = [bytes([1]) + number.to_bytes(19, "big") for number in range(4)]
    for number, contact_id in enumerate(near):
        table.add(Contact(contact_id, "192.0.2.2", number + 1))
    table.buckets[-1].depth = lambda: 5
    newcomer = Contact(far[4], "192.0.2.1", 5)
    silent = table.add(newcomer)
    assert silent == Contact(far[0], "192.0.2.1", 1)
    assert table.knows(newcomer)
    assert table.get(newcomer.id) is None
    table.remove(silent)
    assert table.get(newcomer.id) == newcomer


def test_a_contact_that_moved_is_not_removed_by_its_old_address() -> None:
    table = fill([b"a" * 20])
    moved = Contact(b"a" * 20, "192.0.2.9", 9)
    table.add(moved)
    table.remove(Contact(b"a" * 20, "192.0.2.1", 1))
    assert table.get(b"a" * 20) == moved
