"""What the scheduler knows of work that waits for the device."""

from __future__ import annotations

from collections.abc import Hashable
from enum import IntEnum
from typing import Final

from petals_core.identity import PeerId
from petals_server.scheduling.plan import RowPart, Take

MAX_DECODE_COLUMNS: Final = 16
"""A step that appends at most so many columns is a decode step, speculated tokens included."""


class Urgency(IntEnum):
    """How soon work is wanted; the smaller goes first."""

    DECODE = 0
    """Somebody waits for the next token."""
    BULK = 1
    """A prompt, or a forward without a session."""
    TRAINING = 2
    """A forward whose graph is kept, or a backward."""


class Request:
    """Tokens that somebody wants computed, in one turn or several."""

    def __init__(
        self,
        *,
        urgency: Urgency,
        num_tokens: int,
        arrived_s: float,
        deadline_s: float | None,
        peer_id: PeerId | None = None,
        session: object | None = None,
        key: Hashable | None = None,
        max_turn_tokens: int = 1 << 30,
    ) -> None:
        self.urgency = urgency
        self.num_tokens = num_tokens
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        """Work that is not finished by then is dropped. None: no deadline."""
        self.peer_id = peer_id
        """Whose share it takes; None: the server's own."""
        self.session = session
        """Whatever comes again and again: told apart by identity."""
        self.key = key
        """Requests of the same key can be computed in one turn; None: this one goes alone."""
        self.max_turn_tokens = max_turn_tokens
        """Of this request."""
        self.num_done = 0
        self.is_begun = False
        self.is_blocked = False
        """Whether there was no room for it when its turn came last."""
        self.queue_s = 0.0
        """Time from arrival to the first turn."""
        self.compute_s = 0.0
        """Time of all its turns."""

    @property
    def num_tokens_left(self) -> int:
        return self.num_tokens - self.num_done

    def take(self, count: int) -> Take | None:
        """Get ready to compute the next ``count`` tokens; None while there is no room for them.

        Called with the engine's lock held; the first time a step begins with it. What is taken is computed.

        Raises:
            PetalsError: the request can't be served.
        """
        return Take(rows=(), copies=())

    def passed(self, rows: tuple[RowPart, ...]) -> None:
        """Note that what was taken is computed. Called with the engine's lock held."""
