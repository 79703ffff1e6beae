"""Servers' word that a request itself is at fault: believed when it is said twice."""

from __future__ import annotations

from petals_core.errors import PetalsError, RemoteFailureError
from petals_core.identity import PeerId


class Objections:
    """What servers have against one request, which this client has checked and believes right.

    Errors of the request's own are nobody's fault, and end it. So that a single server can't end whatever comes its way
    by saying so, the first one that objects is left out and another one is asked, without blaming anybody. If that one
    objects too, the request is at fault; if it computes, the first one was.
    """

    def __init__(self) -> None:
        self._first: tuple[PeerId, PetalsError, PetalsError] | None = None
        """Who objects, what it said, and the same explained."""

    @property
    def peers(self) -> set[PeerId]:
        """Who is not to be asked again."""
        return set() if self._first is None else {self._first[0]}

    @property
    def failure(self) -> PetalsError | None:
        """The objection that nobody has confirmed yet, explained: to be raised if there is nobody else to ask."""
        return None if self._first is None else self._first[2]

    def note(self, peer_id: PeerId, error: PetalsError, failure: PetalsError) -> None:
        """Note an objection and ``failure``, which explains it; raises that if it is not the first."""
        if self._first is not None:
            raise failure from error
        self._first = (peer_id, error, failure)

    def refuted(self) -> tuple[PeerId, PetalsError] | None:
        """The request was done: who has objected to it, and what he is to be blamed for. Forgets it."""
        first, self._first = self._first, None
        if first is None:
            return None
        return first[0], RemoteFailureError(f"it refused as wrong what another server did: {first[1].message}")
