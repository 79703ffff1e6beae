from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.identity import Identity, PeerId
from petals_dht.contacts import model_key
from petals_dht.shards import MAX_DEPTH, MAX_WHOLE, is_crowded, is_enough, is_sparse, is_split, key_of, keys_of
from petals_dht.storage import StorageLimits
from petals_dht.testing import FINGERPRINT, make_announcement

MANY = [make_announcement(num_blocks=4, start=number % 4, end=number % 4 + 1) for number in range(40)]


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_has_one_key_of_each_depth(digest: bytes) -> None:
    peer_id = PeerId(digest)
    keys = keys_of(FINGERPRINT, peer_id)
    assert len(set(keys)) == MAX_DEPTH + 1
    assert keys[0] == model_key(FINGERPRINT)
    assert keys == tuple(model_key(FINGERPRINT, digest.hex()[:depth]) for depth in range(MAX_DEPTH + 1))
    assert not set(keys) & set(keys_of("e" * 64, peer_id))


@given(st.integers(0, 1 << 20))
def test_who_announces_goes_below_before_anybody_reads_there(total: int) -> None:
    assert not is_split(total) or is_crowded(total)
    assert not (is_sparse(total) and is_crowded(total))
    assert is_split(total) == (total > MAX_WHOLE)


def test_a_key_still_has_room_when_readers_go_below() -> None:
    assert is_split(StorageLimits().max_entries_per_key)
    assert not is_split(StorageLimits().max_entries_per_key * 3 // 4 - 1)


@settings(max_examples=30)
@given(st.sets(st.integers(0, 39)), st.integers(0, 40))
def test_enough_servers_are_many_and_hold_every_block(chosen: set[int], wanted: int) -> None:
    per_block = [sum(number % 4 == block for number in chosen) for block in range(4)]
    expected = len(chosen) >= wanted and min(per_block) >= 4
    assert is_enough([MANY[number] for number in chosen], wanted) == expected


def test_servers_that_leave_hold_nothing() -> None:
    draining = [make_announcement(num_blocks=1, start=0, end=1, state="draining") for _ in range(5)]
    assert not is_enough(draining, 1)
    assert key_of(FINGERPRINT, Identity.ephemeral().peer_id, 0) == model_key(FINGERPRINT)
