"""Credit: what bounds the memory that a peer can make us hold, without ever stopping a message half-way.

A message *begins* when its first frame is made. It may begin while less than the stream's credit is outstanding on its
stream, and less than the connection's credit in its lane; both sides count the same costs. So an account exceeds its
credit by less than one message, and a message that has begun never waits for another one.
"""

from __future__ import annotations

from typing import Final

from petals_core.errors import ProtocolError
from petals_core.wire.frames import Priority

NUM_LANES: Final = 2
_DECODE = Priority.DECODE
_MESSAGE_OVERHEAD_BYTES = 256
_ENVELOPE_FACTOR = 16
"""A decoded envelope takes about so many times its encoded bytes (small ints and tuples)."""


def message_cost(envelope_bytes: int, payload_bytes: int) -> int:
    """What a message counts for: about the memory that it takes at the receiver, in bytes."""
    return _MESSAGE_OVERHEAD_BYTES + _ENVELOPE_FACTOR * envelope_bytes + payload_bytes


def lane_of(priority: Priority, cost: int, stream_credit_bytes: int) -> int:
    """Lane 0 for decode steps of ordinary size, so that bulk which nobody takes never blocks them; else lane 1."""
    return 0 if priority == _DECODE and cost <= stream_credit_bytes else 1


class SendAccount:
    """The sender's side of one account."""

    __slots__ = ("_credit_bytes", "outstanding_bytes")

    def __init__(self, credit_bytes: int) -> None:
        self._credit_bytes = credit_bytes
        self.outstanding_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether a message may begin."""
        return self.outstanding_bytes < self._credit_bytes

    def give_back(self, num_bytes: int) -> None:
        """Take the receiver's word that it has room again.

        Raises:
            ProtocolError: more comes back than is outstanding.
        """
        if num_bytes > self.outstanding_bytes:
            raise ProtocolError(f"credit of {num_bytes} bytes where {self.outstanding_bytes} are outstanding")
        self.outstanding_bytes -= num_bytes


class ReceiveAccount:
    """The receiver's side of one account.

    Credit goes back in portions of half the window: a decode step costs no frame of its own, and what is held back
    (less than half a window) never keeps a message from beginning.
    """

    __slots__ = ("_credit_bytes", "due_bytes", "outstanding_bytes")

    def __init__(self, credit_bytes: int) -> None:
        self._credit_bytes = credit_bytes
        self.outstanding_bytes = 0
        """Of messages that have begun and whose credit was not sent back."""
        self.due_bytes = 0
        """Of those, what was taken and can be sent back."""

    def begin(self, cost: int) -> None:
        """Charge a message that begins.

        Raises:
            ProtocolError: no message may begin.
        """
        if self.outstanding_bytes >= self._credit_bytes:
            raise ProtocolError(f"a message begins without credit: {self.outstanding_bytes} bytes are outstanding")
        self.outstanding_bytes += cost

    def taken(self, cost: int) -> None:
        """Note that a message does not take room any longer."""
        self.due_bytes += cost
        assert self.due_bytes <= self.outstanding_bytes, "a message was consumed twice"

    @property
    def is_due(self) -> bool:
        """Whether enough has come together to be sent back."""
        return 2 * self.due_bytes >= self._credit_bytes

    def collect(self) -> int:
        """Return what is due, which must now be sent."""
        due_bytes, self.due_bytes = self.due_bytes, 0
        self.outstanding_bytes -= due_bytes
        return due_bytes
