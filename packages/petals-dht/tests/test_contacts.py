from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_dht.contacts import (
    MODELS_KEY,
    Contact,
    distance,
    may_be_told,
    model_key,
    normalised_host,
    pack_contacts,
    source_group,
    unpack_contacts,
)

ids = st.binary(min_size=20, max_size=20)
hosts = st.ip_addresses().map(lambda ip: normalised_host(str(ip)))
contacts = st.builds(Contact, ids, hosts, st.integers(0, 65535))


@given(st.lists(contacts, max_size=20))
def test_contacts_survive_packing(told: list[Contact]) -> None:
    packed = pack_contacts(told)
    assert len(packed[0]) % 26 == 0
    assert len(packed[1]) % 38 == 0
    assert sorted(unpack_contacts(*packed), key=repr) == sorted(told, key=repr)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_bytes_are_some_contacts(packed_4: bytes, packed_6: bytes) -> None:
    assert len(unpack_contacts(packed_4, packed_6)) == len(packed_4) // 26 + len(packed_6) // 38


def test_one_text_per_host() -> None:
    assert normalised_host("::ffff:127.0.0.1") == "127.0.0.1"
    assert normalised_host("2001:DB8:0::1") == "2001:db8::1"
    assert normalised_host("fe80::1%eth0") == "fe80::1"
    with pytest.raises(ValueError, match="example"):
        normalised_host("example.org")


def test_use_is_charged_to_a_network() -> None:
    assert source_group("192.0.2.7") == "192.0.2.7"
    assert source_group("2001:db8::1") == source_group("2001:db8::ffff") != source_group("2001:db8:0:1::1")


@pytest.mark.parametrize(
    ("host", "by", "expected"),
    [
        ("192.0.2.1", "198.51.100.1", True),
        ("127.0.0.1", "198.51.100.1", False),
        ("127.0.0.1", "127.0.0.2", True),
        ("::1", "2001:db8::1", False),
        ("0.0.0.0", "127.0.0.1", False),
        ("224.0.0.1", "198.51.100.1", False),
        ("fe80::1", "2001:db8::1", False),
    ],
)
def test_nobody_sends_us_to_ourselves(host: str, by: str, expected: bool) -> None:
    assert may_be_told(Contact(bytes(20), host, 1), by=by) is expected
    assert not may_be_told(Contact(bytes(20), host, 0), by=by)


def test_keys_differ() -> None:
    assert len({MODELS_KEY, model_key("a"), model_key("b")}) == 3
    assert all(len(key) == 20 for key in (MODELS_KEY, model_key("a")))


@given(ids, ids, ids)
def test_distance_is_a_metric(a: bytes, b: bytes, c: bytes) -> None:
    assert distance(a, b) == distance(b, a)
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)
