"""What the device can be asked to compute: decoded before, advanced turn by turn in its thread, encoded behind."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar, final

from petals_core.identity import PeerId
from petals_server.scheduling.plan import Part
from petals_server.scheduling.request import Request, Urgency

T = TypeVar("T")


class Work(Request, Generic[T]):
    """Something that the device computes, in one turn or several. Used once."""

    def __init__(
        self,
        *,
        urgency: Urgency,
        num_tokens: int,
        deadline_s: float | None,
        peer_id: PeerId | None = None,
        session: object | None = None,
        key: Hashable | None = None,
        max_turn_tokens: int = 1 << 30,
    ) -> None:
        """``deadline_s``: on ``time.monotonic``'s clock."""
        super().__init__(
            urgency=urgency,
            num_tokens=num_tokens,
            arrived_s=time.monotonic(),
            deadline_s=deadline_s,
            peer_id=peer_id,
            session=session,
            key=key,
            max_turn_tokens=max_turn_tokens,
        )
        self.future: asyncio.Future[None] | None = None
        """The engine's, while the device's thread has the work: done when it is computed, or has failed."""

    @property
    def is_heavy(self) -> bool:
        """Whether :meth:`prepare` and :meth:`result` take so long that the event loop should not do them."""
        return False

    @property
    def is_quick(self) -> bool:
        """Whether the event loop may compute this itself, in so far as the work alone decides that."""
        return False

    def prepare(self) -> None:
        """Decode what came, before the work is scheduled; in the event loop or a thread of the engine's.

        Raises:
            PetalsError: what came is broken.
        """

    def advance(self, num_tokens: int) -> bool:
        """Compute one turn alone, in the device's thread, of about so many tokens, pads included.

        Returns whether the result is there.

        Raises:
            PetalsError: the request is at fault, or can't be served; there will be no further turn.
        """
        raise NotImplementedError

    def advance_together(self, parts: Sequence[Part]) -> None:
        """Compute one turn of this and other work of the same key, in the device's thread."""
        raise NotImplementedError

    @abstractmethod
    def result(self) -> T:
        """What came of it, once it is computed; in the event loop or a thread of the engine's."""


def microseconds(seconds: float) -> int:
    """A time as replies carry it."""
    return max(0, round(seconds * 1e6))


@final
class Call(Work[T]):
    """A function that is to run in the device's thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(urgency=Urgency.DECODE, num_tokens=0, deadline_s=None)
        self._function = function
        self._result: T

    def advance(self, num_tokens: int) -> bool:
        self._result = self._function()
        return True

    def result(self) -> T:
        return self._result
