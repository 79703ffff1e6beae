"""Two connections back to back in memory: what one gives out the other one is fed, in pieces and when told."""

from __future__ import annotations

from petals_core.limits import WireLimits
from petals_core.wire.connection import Connection
from petals_core.wire.events import Event, MessageReceived


class Pair:
    """A dialer's and a listener's ``Connection``; index 0 is the dialer.

    Events collect in ``events[index]``, and messages in ``untaken[index]`` until ``take`` gives their credit back.
    """

    def __init__(self, dialer_limits: WireLimits | None = None, listener_limits: WireLimits | None = None) -> None:
        limits = (dialer_limits or WireLimits(), listener_limits or WireLimits())
        self.now = 0.0
        self.dialer = Connection(is_dialer=True, local_limits=limits[0], remote_limits=limits[1], now=self.now)
        self.listener = Connection(is_dialer=False, local_limits=limits[1], remote_limits=limits[0], now=self.now)
        self.ends = (self.dialer, self.listener)
        self.events: tuple[list[Event], list[Event]] = ([], [])
        self.untaken: tuple[list[MessageReceived], list[MessageReceived]] = ([], [])

    def move(self, sender: int, max_bytes: int = 1 << 16, piece_bytes: int | None = None) -> int:
        """Move one batch from ``sender`` to the other end, in pieces; returns its bytes."""
        data = b"".join(self.ends[sender].data_to_send(max_bytes))
        for start in range(0, len(data), piece_bytes or max(1, len(data))):
            piece = data[start : start + (piece_bytes or len(data))]
            self.accept(1 - sender, self.ends[1 - sender].receive_data(piece, self.now))
        return len(data)

    def accept(self, receiver: int, events: list[Event]) -> None:
        """Collect events of one end."""
        self.events[receiver].extend(events)
        self.untaken[receiver].extend(event for event in events if isinstance(event, MessageReceived))

    def take(self, receiver: int) -> MessageReceived | None:
        """Take the oldest message of one end, as an application does."""
        if not self.untaken[receiver]:
            return None
        event = self.untaken[receiver].pop(0)
        self.ends[receiver].consumed(event)
        return event

    def settle(self) -> None:
        """Move and take until nothing happens any more."""
        while self.move(0) + self.move(1) or self.take(0) or self.take(1):
            pass
