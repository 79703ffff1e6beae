"""The outer form of a datagram: bounded, addressed to one node, and in a private swarm authentic and never taken twice.

::

    magic "PD" | version | kind | [tag 32 | time 8 | nonce 12]
        | request id 16 | sender 20 | destination 20 | flags 1 | body

The part in brackets is there exactly in a private swarm. The tag is an HMAC of all other bytes under the swarm's key,
with keys of their own for requests and responses. It is checked before anything behind it is looked at.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import IntEnum

from petals_core.limits import MAX_CLOCK_SKEW_S, MAX_DATAGRAM_BYTES
from petals_core.swarm_key import PROOF_BYTES, SwarmKey
from petals_dht.contacts import ID_BYTES

REQUEST_ID_BYTES = 16
NONCE_BYTES = 12
_TIME_BYTES = 8
_PREFIX = b"PD\x01"
_IS_SEALED = 0x80
_IS_CLIENT = 0x01
_KIND_OFFSET = len(_PREFIX)
_OPEN_START = _KIND_OFFSET + 1
_SEALED_START = _OPEN_START + PROOF_BYTES + _TIME_BYTES + NONCE_BYTES
_ADDRESSED_BYTES = REQUEST_ID_BYTES + 2 * ID_BYTES + 1
MAX_BODY_BYTES = MAX_DATAGRAM_BYTES - _SEALED_START - _ADDRESSED_BYTES
"""The same with and without a swarm key, so that a swarm can be made private without losing announcements."""
_NOBODY = bytes(ID_BYTES)
_PURPOSES = {1: b"datagram request", 2: b"datagram response"}


class DatagramError(ValueError):
    """A datagram is not for us to answer; ``reason`` is one of a few words, to count by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Kind(IntEnum):
    """Which way a datagram goes."""

    REQUEST = 1
    RESPONSE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Datagram:
    """One datagram without its seal."""

    kind: Kind
    request_id: bytes
    """16 random bytes of the request; the response repeats them."""
    sender: bytes
    destination: bytes | None
    """The node id that it is meant for; None where the sender knows only an address, as when it joins."""
    is_client: bool
    """The sender answers nothing and stores nothing (compare BEP 43), so it belongs into no routing table."""
    body: bytes


class ReplayWindow:
    """Remembers which nonces were seen, within bounded time and memory.

    A datagram that is older than anything remembered is refused, so nothing is ever taken twice: neither after the
    memory was full, nor by a node that was restarted.
    """

    def __init__(self, *, started_at_s: float, max_nonces: int = 1 << 16) -> None:
        self._floor_us = int(started_at_s * 1e6)
        self._max_nonces = max_nonces
        self._seen: set[tuple[int, bytes]] = set()
        self._by_age: list[tuple[int, bytes]] = []

    def admit(self, time_us: int, nonce: bytes, *, now_s: float) -> bool:
        """Take note of an authentic datagram; False if it is too old, from the future, or was seen."""
        skew_us = int(MAX_CLOCK_SKEW_S * 1e6)
        now_us = int(now_s * 1e6)
        self._forget(now_us - skew_us)
        seen = (time_us, nonce)
        if not max(self._floor_us, now_us - skew_us) <= time_us <= now_us + skew_us or seen in self._seen:
            return False
        self._seen.add(seen)
        heapq.heappush(self._by_age, seen)
        while len(self._by_age) > self._max_nonces:
            oldest = heapq.heappop(self._by_age)
            self._seen.discard(oldest)
            self._floor_us = max(self._floor_us, oldest[0] + 1)
        return True

    def _forget(self, before_us: int) -> None:
        while self._by_age and self._by_age[0][0] < before_us:
            self._seen.discard(heapq.heappop(self._by_age))

    def __len__(self) -> int:
        return len(self._by_age)


class DatagramSeal:
    """Turns datagrams into bytes and back, with the swarm's key where there is one."""

    def __init__(self, own_id: bytes, swarm_key: SwarmKey | None, window: ReplayWindow) -> None:
        self._own_id = own_id
        self._swarm_key = swarm_key
        self._window = window

    def seal(self, datagram: Datagram, *, now_s: float, nonce: bytes) -> bytes:
        """Return the bytes to send. ``nonce`` is 12 random bytes that were never used before.

        Raises:
            DatagramError: the body is too large.
        """
        if len(datagram.body) > MAX_BODY_BYTES:
            raise DatagramError("too large")
        addressed = b"".join(
            (
                datagram.request_id,
                datagram.sender,
                datagram.destination or _NOBODY,
                bytes([_IS_CLIENT if datagram.is_client else 0]),
                datagram.body,
            )
        )
        if self._swarm_key is None:
            return _PREFIX + bytes([datagram.kind]) + addressed
        head = _PREFIX + bytes([datagram.kind | _IS_SEALED])
        sealed = int(now_s * 1e6).to_bytes(_TIME_BYTES, "big") + nonce + addressed
        return head + self._swarm_key.proof(_PURPOSES[datagram.kind], head, sealed) + sealed

    def open(self, content: bytes, *, now_s: float) -> Datagram:
        """Check and read bytes from the network.

        A request is taken at most once, and only by the node that it is meant for. A response needs no memory here:
        whoever waits for its request id waits for one response.

        Raises:
            DatagramError: too large or short, of another protocol, of another swarm, forged, stale, repeated, or meant
                for another node.
        """
        if len(content) > MAX_DATAGRAM_BYTES:
            raise DatagramError("too large")
        is_sealed = self._swarm_key is not None
        start = _SEALED_START if is_sealed else _OPEN_START
        if len(content) < start + _ADDRESSED_BYTES or not content.startswith(_PREFIX):
            raise DatagramError("malformed")
        mark = content[_KIND_OFFSET]
        if bool(mark & _IS_SEALED) != is_sealed:
            raise DatagramError("other swarm")
        purpose = _PURPOSES.get(mark & ~_IS_SEALED)
        if purpose is None:
            raise DatagramError("malformed")
        kind = Kind(mark & ~_IS_SEALED)
        if self._swarm_key is not None:
            self._check_seal(content, self._swarm_key, purpose)
        datagram = _addressed(kind, content[start:])
        if datagram.sender == self._own_id:
            raise DatagramError("own")
        if datagram.destination not in (None, self._own_id):
            raise DatagramError("other node")
        if is_sealed:
            self._check_fresh(content, kind, now_s)
        return datagram

    def _check_seal(self, content: bytes, swarm_key: SwarmKey, purpose: bytes) -> None:
        tag_end = _OPEN_START + PROOF_BYTES
        if not swarm_key.check(content[_OPEN_START:tag_end], purpose, content[:_OPEN_START], content[tag_end:]):
            raise DatagramError("other swarm")

    def _check_fresh(self, content: bytes, kind: Kind, now_s: float) -> None:
        time_end = _OPEN_START + PROOF_BYTES + _TIME_BYTES
        time_us = int.from_bytes(content[time_end - _TIME_BYTES : time_end], "big")
        if kind is Kind.REQUEST:
            if not self._window.admit(time_us, content[time_end : time_end + NONCE_BYTES], now_s=now_s):
                raise DatagramError("stale")
        elif abs(time_us - now_s * 1e6) > MAX_CLOCK_SKEW_S * 1e6:
            raise DatagramError("stale")


def _addressed(kind: Kind, content: bytes) -> Datagram:
    sender_end = REQUEST_ID_BYTES + ID_BYTES
    destination = content[sender_end : sender_end + ID_BYTES]
    return Datagram(
        kind=kind,
        request_id=content[:REQUEST_ID_BYTES],
        sender=content[REQUEST_ID_BYTES:sender_end],
        destination=None if destination == _NOBODY else destination,
        is_client=bool(content[_ADDRESSED_BYTES - 1] & _IS_CLIENT),
        body=content[_ADDRESSED_BYTES:],
    )
