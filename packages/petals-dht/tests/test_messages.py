from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core import schema
from petals_dht import messages
from petals_dht.datagrams import MAX_BODY_BYTES
from petals_dht.messages import CheckReachable, Find, FindNode, Found, Nodes, Ping, Pong, Reached, Store, Stored
from petals_dht.responder import FOUND_BYTES

KEY, TOKEN, SLOT = b"k" * 20, b"t" * 8, b"s" * 32


@pytest.mark.parametrize(
    "request_",
    [
        Ping(),
        FindNode(key=KEY),
        Find(key=KEY),
        Find(key=KEY, after=SLOT, until=SLOT),
        Store(key=KEY, token=TOKEN, entry=bytes(960)),
        CheckReachable(token=TOKEN, port=1, peer_id=bytes(32)),
    ],
)
def test_requests(request_: messages.Request) -> None:
    body = messages.encode(request_)
    assert len(body) <= MAX_BODY_BYTES
    assert messages.decode_request(body) == request_


@pytest.mark.parametrize(
    "response",
    [
        Pong(host="::1", port=1, token=TOKEN),
        Nodes(token=TOKEN, contacts_4=bytes(26), contacts_6=bytes(38)),
        Found(token=TOKEN, entries=(b"x",), total=1, digest=bytes(8), next=SLOT),
        Stored(is_kept=False, reason="x" * 200),
        Reached(host="::1", is_reachable=None, reason=""),
    ],
)
def test_responses(response: messages.Response) -> None:
    body = messages.encode(response)
    assert len(body) <= MAX_BODY_BYTES
    assert messages.decode_response(body) == response


def test_room_for_the_largest_entry() -> None:
    found = Found(token=TOKEN, entries=(), total=1 << 20, digest=bytes(8), next=SLOT, contacts_4=b"", contacts_6=b"")
    assert len(messages.encode(found)) <= FOUND_BYTES
    full = Found(token=TOKEN, entries=(bytes(960),), total=1 << 20, digest=bytes(8), next=SLOT)
    assert len(messages.encode(full)) <= MAX_BODY_BYTES
    crowded = Found(token=TOKEN, entries=(), total=1 << 20, digest=bytes(8), next=SLOT, contacts_6=bytes(20 * 38))
    assert len(messages.encode(crowded)) <= MAX_BODY_BYTES


@given(st.binary(max_size=300))
def test_garbage_raises_only_schema_errors(body: bytes) -> None:
    for decode in (messages.decode_request, messages.decode_response):
        with pytest.raises(schema.SchemaError):
            decode(body)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=10,
)


@settings(max_examples=50)
@given(
    st.sampled_from(["ping", "find_node", "find_value", "store", "check", "__class__"]),
    st.dictionaries(
        st.sampled_from(["key", "after", "until", "token", "entry", "port", "peer_id", "entries", "digest"]), values
    ),
)
def test_wrong_fields_raise_only_schema_errors(kind: str, fields: dict[str, object]) -> None:
    body = schema.pack({**fields, "kind": kind})
    for decode in (messages.decode_request, messages.decode_response):
        with contextlib.suppress(schema.SchemaError):
            decode(body)
