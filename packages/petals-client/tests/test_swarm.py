"""What is said of servers that fail."""

from __future__ import annotations

import pytest

from petals_client.swarm import explain_end, explain_failure
from petals_core.errors import InvalidRequestError, OverloadedError, PeerConnectionError, PetalsError
from petals_core.identity import Identity
from petals_core.routing.graph import Hop

HOP = Hop(peer_id=Identity.ephemeral().peer_id, start=2, end=4)


def test_what_helps_is_said_when_nothing_more_is_tried() -> None:
    failure = explain_failure(HOP, PeerConnectionError("it has gone"))
    assert failure.message == f"server {HOP.peer_id.short} (blocks 2:4) failed: it has gone"
    end = explain_end(failure)
    assert isinstance(end, PeerConnectionError)
    assert end.message == f"{failure.message}; start another server of these blocks, or try again later"


@pytest.mark.parametrize("error", [InvalidRequestError("too long"), OverloadedError("full", retry_after_s=2.0)])
def test_what_no_other_server_would_help_with_stands_alone(error: PetalsError) -> None:
    end = explain_end(explain_failure(HOP, error))
    assert type(end) is type(error)
    assert end.message.endswith(f"failed: {error.message}")
    assert end.retry_after_s == error.retry_after_s
