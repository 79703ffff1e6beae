from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.announcement import SignedAnnouncement
from petals_core.errors import InvalidAnnouncementError
from petals_core.identity import Identity
from petals_dht.contacts import MODELS_KEY, model_key
from petals_dht.storage import FIRST_SLOT, Storage, StorageLimits, digest_of, slot_of
from petals_dht.testing import FINGERPRINT, make_announcement

NOW_S = 1_800_000_000.0
KEY = model_key(FINGERPRINT)
IDENTITIES = [Identity.ephemeral() for _ in range(4)]
MANY = [make_announcement(now_s=NOW_S, public_name="x" * (number % 60)) for number in range(100)]


def store(
    storage: Storage, signed: SignedAnnouncement, *, key: bytes = KEY, host: str = "192.0.2.1", at_s: float = 0
) -> None:
    storage.store(key, signed.encoded, source_host=host, now_s=NOW_S + at_s)


def kept(storage: Storage, key: bytes = KEY, *, at_s: float = 0) -> list[SignedAnnouncement]:
    return storage.announcements(key, now_s=NOW_S + at_s)


def test_the_later_announcement_of_a_peer_wins_in_any_order() -> None:
    old = make_announcement(IDENTITIES[0], now_s=NOW_S, start=0)
    new = make_announcement(IDENTITIES[0], now_s=NOW_S + 1, start=2)
    for order in ((old, new), (new, old)):
        storage = Storage()
        for signed in order:
            store(storage, signed)
        assert kept(storage) == [new]


def test_who_has_left_does_not_come_back() -> None:
    online = make_announcement(IDENTITIES[0], now_s=NOW_S, expires_at_s=NOW_S + 1000)
    offline = make_announcement(IDENTITIES[0], now_s=NOW_S + 1, state="offline", expires_at_s=NOW_S + 1000)
    storage = Storage()
    for signed in (online, offline, online):
        store(storage, signed)
    assert kept(storage) == [offline]
    assert kept(storage, at_s=999) == [offline]
    assert not kept(storage, at_s=1000)


actions = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 20), st.sampled_from(["online", "offline"])), max_size=12
)


@settings(max_examples=50)
@given(actions, st.randoms(use_true_random=False))
def test_all_nodes_agree_whatever_the_order(steps: list[tuple[int, int, str]], random: object) -> None:
    announcements = [
        make_announcement(IDENTITIES[peer], now_s=NOW_S + second, state=state) for peer, second, state in steps
    ]
    shuffled = list(announcements)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    storages = [Storage(), Storage()]
    for storage, order in zip(storages, (announcements, shuffled), strict=True):
        for signed in order:
            store(storage, signed, at_s=20)
    pages = [storage.page(KEY, now_s=NOW_S + 20, max_bytes=10**6) for storage in storages]
    assert pages[0] == pages[1]
    assert pages[0].total == len({peer for peer, _, _ in steps})


@pytest.mark.parametrize("change", [b"", b"\x00", b"garbage"])
def test_altered_bytes_are_refused(change: bytes) -> None:
    storage = Storage()
    encoded = make_announcement(now_s=NOW_S).encoded
    position = encoded.index(b"test-model")
    forged = encoded[:position] + b"best" + encoded[position + 4 :] + change
    with pytest.raises(InvalidAnnouncementError):
        storage.store(KEY, forged, source_host="192.0.2.1", now_s=NOW_S)
    assert storage.num_entries == storage.total_bytes == 0


def test_expired_future_oversized_and_misplaced_are_refused() -> None:
    storage = Storage()
    signed = make_announcement(now_s=NOW_S)
    for key, encoded, now_s in (
        (KEY, signed.encoded, NOW_S + 300),
        (KEY, signed.encoded, NOW_S - 61),
        (KEY, signed.encoded + bytes(1000), NOW_S),
        (model_key("other"), signed.encoded, NOW_S),
        (MODELS_KEY, make_announcement(now_s=NOW_S, state="offline").encoded, NOW_S),
    ):
        with pytest.raises(InvalidAnnouncementError):
            storage.store(key, encoded, source_host="192.0.2.1", now_s=now_s)
    assert storage.num_entries == 0


def test_a_verified_announcement_still_expires() -> None:
    storage = Storage()
    signed = make_announcement(now_s=NOW_S)
    store(storage, signed)
    store(storage, signed)
    assert storage.num_entries == 1
    with pytest.raises(InvalidAnnouncementError, match="expired"):
        store(storage, signed, at_s=301)


def test_a_liar_can_not_replace_another_model_in_the_list() -> None:
    storage = Storage()
    true = make_announcement(now_s=NOW_S)
    lies = [
        make_announcement(now_s=NOW_S + 1, num_blocks=13),
        make_announcement(now_s=NOW_S + 1, fingerprint="e" * 64),
        make_announcement(now_s=NOW_S + 1, model_name="test-model2"),
    ]
    for signed in (true, *lies):
        store(storage, signed, key=MODELS_KEY, at_s=1)
    assert true in kept(storage, MODELS_KEY, at_s=1)
    assert len(kept(storage, MODELS_KEY, at_s=1)) == 4
    renewed = make_announcement(now_s=NOW_S + 2)
    store(storage, renewed, key=MODELS_KEY, at_s=2)
    assert renewed in kept(storage, MODELS_KEY, at_s=2)
    assert len(kept(storage, MODELS_KEY, at_s=2)) == 4


@given(st.integers(1100, 4000), st.integers(0, 100))
@settings(max_examples=30)
def test_pages_are_everything_once(max_bytes: int, count: int) -> None:
    storage = Storage()
    for signed in MANY[:count]:
        store(storage, signed)
    entries: list[bytes] = []
    after: bytes | None = FIRST_SLOT
    while after is not None:
        page = storage.page(KEY, now_s=NOW_S, max_bytes=max_bytes, after=after)
        assert sum(map(len, page.entries)) <= max_bytes
        assert page.total == count
        entries += page.entries
        after = page.next
    assert entries == [signed.encoded for signed in kept(storage)]
    assert sorted(entries) == sorted(signed.encoded for signed in MANY[:count])


def test_the_digest_tells_what_is_kept() -> None:
    first, second = Storage(), Storage()
    for storage, order in ((first, MANY[:3]), (second, MANY[2::-1])):
        for signed in order:
            store(storage, signed)
    assert first.page(KEY, now_s=NOW_S, max_bytes=0).digest == second.page(KEY, now_s=NOW_S, max_bytes=0).digest
    store(first, MANY[4])
    assert first.page(KEY, now_s=NOW_S, max_bytes=0).digest != second.page(KEY, now_s=NOW_S, max_bytes=0).digest


def test_the_greediest_source_gives_way() -> None:
    storage = Storage(StorageLimits(max_entries_per_key=10))
    for signed in MANY[:10]:
        store(storage, signed, host="192.0.2.1")
    with pytest.raises(InvalidAnnouncementError, match="no room"):
        store(storage, MANY[10], host="192.0.2.1")
    for number, signed in enumerate(MANY[20:25]):
        store(storage, signed, host=f"198.51.100.{number}")
    assert storage.num_entries == 10
    assert set(MANY[20:25]) <= set(kept(storage))


def test_a_source_takes_no_more_than_its_part_of_a_key() -> None:
    storage = Storage(StorageLimits(max_entries_per_source=3))
    for signed in MANY[:3]:
        store(storage, signed, host="192.0.2.1")
    with pytest.raises(InvalidAnnouncementError, match="no room"):
        store(storage, MANY[3], host="192.0.2.1")
    store(storage, MANY[0], host="192.0.2.1")
    store(storage, MANY[3], key=MODELS_KEY, host="192.0.2.1")
    store(storage, MANY[4], host="198.51.100.1")
    for number in range(3):
        store(storage, MANY[5 + number], host=f"2001:db8::{number}")
    with pytest.raises(InvalidAnnouncementError, match="no room"):
        store(storage, MANY[9], host="2001:db8::ffff")
    storage.sweep(now_s=NOW_S + 300)
    renewed = make_announcement(now_s=NOW_S + 300)
    store(storage, renewed, host="192.0.2.1", at_s=300)
    assert storage.num_entries == 1


def test_a_later_one_that_is_kept_is_told() -> None:
    old, new = (make_announcement(IDENTITIES[0], now_s=NOW_S + second) for second in (0, 1))
    storage = Storage()
    store(storage, new, at_s=1)
    store(storage, old, at_s=1)
    assert storage.later(KEY, old.encoded, now_s=NOW_S + 1) == new.encoded
    assert storage.later(KEY, new.encoded, now_s=NOW_S + 1) is None
    assert storage.later(KEY, MANY[0].encoded, now_s=NOW_S + 1) is None


def test_total_bytes_are_bounded() -> None:
    storage = Storage(StorageLimits(max_total_bytes=20_000))
    num_refused = 0
    for number in range(40):
        signed = make_announcement(now_s=NOW_S, fingerprint=f"{number:064}")
        try:
            store(storage, signed, key=model_key(signed.announcement.fingerprint), host="192.0.2.1")
        except InvalidAnnouncementError:
            num_refused += 1
        assert storage.total_bytes <= 20_000
    assert num_refused
    assert storage.num_entries + num_refused == 40
    honest = make_announcement(now_s=NOW_S)
    store(storage, honest, host="198.51.100.1")
    assert kept(storage) == [honest]


def test_sweeping_leaves_nothing() -> None:
    storage = Storage()
    for signed in MANY:
        store(storage, signed)
        store(storage, signed, key=MODELS_KEY)
    assert storage.num_entries == 101
    storage.sweep(now_s=NOW_S + 299)
    assert storage.num_entries == 101
    storage.sweep(now_s=NOW_S + 300)
    assert storage.num_entries == storage.total_bytes == 0


def test_slots() -> None:
    signed = MANY[0]
    assert slot_of(KEY, signed) == signed.peer_id.digest
    assert slot_of(MODELS_KEY, signed) == slot_of(MODELS_KEY, MANY[1])


def test_a_part_of_a_key_has_a_digest_of_its_own() -> None:
    storage = Storage()
    for signed in MANY:
        store(storage, signed)
    slots = sorted(signed.peer_id.digest for signed in MANY)
    by_slot = {signed.peer_id.digest: signed.encoded for signed in MANY}
    whole = storage.page(KEY, now_s=NOW_S, max_bytes=0).digest
    part = storage.page(KEY, now_s=NOW_S, max_bytes=0, after=slots[9], until=slots[29]).digest
    assert whole == digest_of(by_slot[slot] for slot in slots)
    assert part == digest_of(by_slot[slot] for slot in slots[10:30])
    assert storage.page(KEY, now_s=NOW_S, max_bytes=0, after=slots[0]).digest == whole, "too many for each page"


def test_keys_below_that_of_a_model_keep_their_peers_only() -> None:
    storage = Storage()
    signed = MANY[0]
    digits = signed.peer_id.digest.hex()
    for depth in range(4):
        store(storage, signed, key=model_key(FINGERPRINT, digits[:depth]))
    other = "0" if digits[0] != "0" else "1"
    for key in (model_key(FINGERPRINT, other), model_key(FINGERPRINT, digits[:4])):
        with pytest.raises(InvalidAnnouncementError, match="another key"):
            store(storage, signed, key=key)
    assert storage.num_entries == 4
    assert storage.count(model_key(FINGERPRINT, digits[:2]), now_s=NOW_S) == 1
