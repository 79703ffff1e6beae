"""When it is believed that a request is wrong, and who is to blame when it was not."""

from __future__ import annotations

import pytest

from petals_client.objections import Objections
from petals_core.errors import Disposition, InvalidRequestError
from petals_core.identity import Identity

ONE, OTHER = Identity.ephemeral().peer_id, Identity.ephemeral().peer_id
SAID = InvalidRequestError("three rows where two are")


def explained(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"server {name} failed: {SAID.message}")


@pytest.mark.parametrize("second", [OTHER, ONE])
def test_the_second_objection_is_raised(second: object) -> None:
    objections = Objections()
    objections.note(ONE, SAID, explained("one"))
    assert objections.peers == {ONE}
    with pytest.raises(InvalidRequestError, match="server two failed: three rows"):
        objections.note(second, SAID, explained("two"))  # type: ignore[arg-type]


def test_who_alone_objected_has_failed_when_the_request_is_done() -> None:
    objections = Objections()
    assert objections.refuted() is None
    objections.note(ONE, SAID, explained("one"))
    assert objections.failure is not None
    refuted = objections.refuted()
    assert refuted is not None
    assert refuted[0] == ONE
    assert refuted[1].disposition is Disposition.GO_ELSEWHERE
    assert refuted[1].message == "it refused as wrong what another server did: three rows where two are"
    assert (objections.refuted(), objections.failure, objections.peers) == (None, None, set())
