import dataclasses
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core import schema
from petals_core.addresses import Address
from petals_core.announcement import Announcement, SignedAnnouncement
from petals_core.errors import InvalidAnnouncementError
from petals_core.identity import Identity
from petals_core.limits import MAX_ANNOUNCEMENT_BYTES, MAX_ANNOUNCEMENT_LIFETIME_S, MAX_CLOCK_SKEW_S
from petals_core.testing.strategies import announcements

NOW_S = 1.8e9
SERVER = Identity(Ed25519PrivateKey.from_private_bytes(b"s" * 32))
EXAMPLE = Announcement(
    model_name="org/model",
    fingerprint="f",
    num_blocks=12,
    start=2,
    end=8,
    addresses=(Address("203.0.113.5", 31330),),
    state="online",
    torch_dtype="bfloat16",
    issued_at_s=NOW_S,
    expires_at_s=NOW_S + 60,
)


def signed(**changes: Any) -> bytes:
    """An announcement whose map has such changes and whose signature is right."""
    fields = schema.unpack(schema.unpack(SignedAnnouncement.sign(EXAMPLE, SERVER).encoded)[2])
    content = schema.pack({key: value for key, value in (fields | changes).items() if value != "remove"})
    return schema.pack([SERVER.public_key, SERVER.sign(b"petals announcement 1\0" + content), content])


@settings(max_examples=60)
@given(announcements(NOW_S))
def test_an_announcement_survives_the_wire(announcement: Announcement) -> None:
    sent = SignedAnnouncement.sign(announcement, SERVER)
    assert len(sent.encoded) <= MAX_ANNOUNCEMENT_BYTES
    received = SignedAnnouncement.decode(sent.encoded, now_s=NOW_S)
    assert received == sent
    assert received.announcement == announcement
    assert received.peer_id == SERVER.peer_id


@settings(max_examples=60)
@given(st.data())
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    content = bytearray(SignedAnnouncement.sign(EXAMPLE, SERVER).encoded)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidAnnouncementError):
        SignedAnnouncement.decode(bytes(content), now_s=NOW_S)


@given(st.binary(max_size=200))
def test_garbage_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidAnnouncementError):
        SignedAnnouncement.decode(content, now_s=NOW_S)


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 8},
        {"end": 13},
        {"start": -1},
        {"num_blocks": 5000},
        {"addresses": ["no address"]},
        {"addresses": ["203.0.113.5:31330"] * 5},
        {"addresses": [5]},
        {"state": "sleeping"},
        {"torch_dtype": "float4"},
        {"expires_at_s": NOW_S + MAX_ANNOUNCEMENT_LIFETIME_S + 1},
        {"expires_at_s": NOW_S - 1},
        {"issued_at_s": NOW_S + 60},
        {"issued_at_s": float("nan")},
        {"model_name": "a\x1b[2Jb"},
        {"model_name": "remove"},
        {"load": float("inf")},
        {"next_delays": [[b"short", 0.1]]},
    ],
)
def test_content_that_can_not_be_is_refused_though_it_is_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidAnnouncementError):
        SignedAnnouncement.decode(signed(**changes), now_s=NOW_S)


def test_unknown_fields_of_later_versions_are_kept_in_the_encoded_form() -> None:
    encoded = signed(colour="blue")
    received = SignedAnnouncement.decode(encoded, now_s=NOW_S)
    assert received.announcement == EXAMPLE
    assert received.encoded == encoded


def test_expired_and_future_announcements_are_refused() -> None:
    encoded = SignedAnnouncement.sign(EXAMPLE, SERVER).encoded
    SignedAnnouncement.decode(encoded, now_s=NOW_S + 59.9)
    SignedAnnouncement.decode(encoded, now_s=NOW_S - MAX_CLOCK_SKEW_S)
    with pytest.raises(InvalidAnnouncementError, match="expired"):
        SignedAnnouncement.decode(encoded, now_s=NOW_S + 60)
    with pytest.raises(InvalidAnnouncementError, match="future"):
        SignedAnnouncement.decode(encoded, now_s=NOW_S - MAX_CLOCK_SKEW_S - 1)
    assert SignedAnnouncement.decode(encoded, now_s=None).announcement == EXAMPLE


def test_a_signature_by_another_key_is_refused() -> None:
    _, signature, content = schema.unpack(SignedAnnouncement.sign(EXAMPLE, SERVER).encoded)
    forged = schema.pack([Identity.ephemeral().public_key, signature, content])
    with pytest.raises(InvalidAnnouncementError, match="not by its key"):
        SignedAnnouncement.decode(forged, now_s=NOW_S)


def test_too_large_an_announcement_is_refused_by_both_sides() -> None:
    large = dataclasses.replace(EXAMPLE, adapters=tuple(str(number) * 120 for number in range(8)))
    with pytest.raises(InvalidAnnouncementError, match="fewer adapters"):
        SignedAnnouncement.sign(large, SERVER)
    with pytest.raises(InvalidAnnouncementError, match="over 960"):
        SignedAnnouncement.decode(bytes(MAX_ANNOUNCEMENT_BYTES + 1), now_s=NOW_S)


@pytest.mark.parametrize("parts", [[b"a"], [b"k" * 32, b"s" * 64, b"c", b"d"], [b"k" * 31, b"s" * 64, b"c"], {}, 5])
def test_another_outer_form_is_refused(parts: object) -> None:
    with pytest.raises(InvalidAnnouncementError):
        SignedAnnouncement.decode(schema.pack(parts), now_s=NOW_S)
