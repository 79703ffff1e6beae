from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_core.identity import Identity
from petals_dht.contacts import Contact
from petals_dht.record import MAX_RECORD_BYTES, NodeRecord

RECORD = NodeRecord(
    peer_id=str(Identity.ephemeral().peer_id),
    address=("127.0.0.1", 31330),
    pid=7,
    started_at_s=1.7e9,
    saved_at_s=1.7e9 + 60,
    contacts=(Contact(b"a" * 20, "192.0.2.1", 31330), Contact(b"b" * 20, "2001:db8::1", 1)),
    num_answering=1,
    num_announcements=12,
    stored_bytes=3456,
    num_requests=100,
    dropped=(("malformed", 3), ("rate", 4)),
)


def test_records_come_back() -> None:
    assert NodeRecord.decode(RECORD.encode().encode()) == RECORD
    assert RECORD.to_json(round_trip_s=0.5)["dropped"] == {"malformed": 3, "rate": 4}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON"),
        (b"\x80\x04cos\nsystem", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "expected a map"),
        (b'{"format": 2}', "NodeRecord.format"),
        (b"{}", "NodeRecord.peer_id is missing"),
        (b" " * (MAX_RECORD_BYTES + 1), "bytes"),
    ],
)
def test_what_is_no_record_is_said(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        NodeRecord.decode(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
names = sorted(json.loads(RECORD.encode()))


@given(st.sampled_from(names), json_values)
def test_any_field_may_be_wrong(name: str, value: Any) -> None:
    fields = {**json.loads(RECORD.encode()), name: value}
    try:
        record = NodeRecord.decode(json.dumps(fields).encode())
    except ValueError:
        return
    assert NodeRecord.decode(record.encode().encode()) == record


@pytest.mark.parametrize(
    "contact",
    [["zz", "192.0.2.1", 1], ["61" * 19, "192.0.2.1", 1], ["61" * 20, "host", 1], ["61" * 20, "192.0.2.1", 0], []],
)
def test_wrong_contacts(contact: list[Any]) -> None:
    fields = {**json.loads(RECORD.encode()), "contacts": [contact]}
    with pytest.raises(ValueError, match=r"NodeRecord.contacts"):
        NodeRecord.decode(json.dumps(fields).encode())
