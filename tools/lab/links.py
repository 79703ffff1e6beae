"""When packets arrive that pass between hosts with rates, delays, loss, bounded queues and outages.

A machine of values: it is told the time and what was sent, and says what arrives and when it wants to be asked again.
Every packet passes its sender's way up to the middle of the network and its receiver's way down. Each way has a queue
that is served at the way's rate, drops what doesn't fit (tail drop), loses packets by chance, and then takes the delay.

A large packet stands for a train of segments (what a network card's segmentation offload makes of it). Its first
segment may be on the way down while its last is still on the way up: the size of trains does not add to the delay.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from lab.settings import HostSettings

T = TypeVar("T")
MAX_HELD_BYTES = 256 << 20
"""What all ways together hold; more is dropped, so that a lab without rates can't take the machine's memory."""


_TRAIN_S, _TRAIN_QUEUE_SHARE = 5e-3, 0.25
_SEGMENT_BYTES = 1500
_KERNEL_SEGMENTS, _KERNEL_BYTES = 2, 65_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Trains:
    """How many segments a host's TCP hands over together.

    A router's work goes by the number of trains, but each waits for its last segment, and a queue drops all of it.
    """

    usual_segments: int = _KERNEL_SEGMENTS
    """Even where TCP would choose fewer: what fits the slowest path from here."""
    max_bytes: int = _KERNEL_BYTES
    """With headers: what fits the host's own way up."""
    are_long: bool = False
    """Whether TCP that paces may also make them as long as is allowed, because that fits all paths from here."""

    @classmethod
    def of(cls, name: str, hosts: Mapping[str, HostSettings]) -> Trains:
        """Choose for one of the hosts: 5 ms of a rate and a quarter of its queue fit, and two segments always do.

        Where no rate is on the way it is the kernel's choice, by the round trip.
        """
        up = _train_bytes(hosts[name], hosts[name].up_bits_per_s)
        downs = [_train_bytes(each, each.down_bits_per_s) for other, each in hosts.items() if other != name]
        least = min((num_bytes for num_bytes in (up, *downs) if num_bytes is not None), default=0)
        return cls(
            usual_segments=max(_KERNEL_SEGMENTS, least // _SEGMENT_BYTES),
            max_bytes=_KERNEL_BYTES if up is None else max(_KERNEL_SEGMENTS * _SEGMENT_BYTES, up),
            are_long=up is not None and up == least,
        )


def _train_bytes(settings: HostSettings, bits_per_s: float | None) -> int | None:
    if bits_per_s is None:
        return None
    queue_bytes = settings.queue_limit_bytes(bits_per_s) * _TRAIN_QUEUE_SHARE
    return int(min(_KERNEL_BYTES, queue_bytes, bits_per_s / 8 * _TRAIN_S))


class Drop(StrEnum):
    """Why a packet vanished."""

    LOSS = "loss"
    QUEUE = "queue"
    OUTAGE = "outage"
    MEMORY = "memory"


@dataclass(slots=True, kw_only=True)
class Counters:
    """What has passed between a host and the middle."""

    sent_packets: int = 0
    sent_bytes: int = 0
    received_packets: int = 0
    received_bytes: int = 0
    dropped: dict[Drop, int] = field(default_factory=lambda: dict.fromkeys(Drop, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet(Generic[T]):
    """Something on its way."""

    source: str
    destination: str
    num_bytes: int
    """On the wire, with the headers of every segment."""
    segment_bytes: int
    """The first segment's share; all of it, if the packet is no train."""
    content: T


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """When a packet leaves a queue."""

    head_s: float
    """The end of its first segment."""
    tail_s: float


class Way:
    """One direction between a host and the middle: a bounded queue served at a rate, and loss from a seed."""

    def __init__(self, bits_per_s: float | None, queue_bytes: int, loss: float, chance: random.Random) -> None:
        self._bits_per_s = bits_per_s
        self._queue_bytes = queue_bytes
        self._loss = loss
        self._chance = chance
        self._free_s = 0.0

    def backlog_bytes(self, now_s: float) -> float:
        """What still waits for the rate."""
        return 0.0 if self._bits_per_s is None else max(0.0, self._free_s - now_s) * self._bits_per_s / 8

    def change(self, now_s: float, bits_per_s: float | None, queue_bytes: int, loss: float) -> None:
        """Go on with other settings; what waits goes on at the new rate, what has been served stays so."""
        backlog = self.backlog_bytes(now_s)
        self._bits_per_s, self._queue_bytes, self._loss = bits_per_s, queue_bytes, loss
        self._free_s = now_s if bits_per_s is None else now_s + backlog * 8 / bits_per_s

    def pass_through(self, head_s: float, tail_s: float, packet: Packet[T]) -> Passage | Drop:
        """Queue a packet whose first segment comes at ``head_s`` and whose last comes at ``tail_s``."""
        if self._loss and self._chance.random() < self._loss:
            return Drop.LOSS
        if self._bits_per_s is None:
            return Passage(head_s=head_s, tail_s=tail_s)
        backlog = self.backlog_bytes(head_s)
        if backlog and backlog + packet.num_bytes > self._queue_bytes:
            return Drop.QUEUE
        s_per_byte = 8 / self._bits_per_s
        start_s = max(head_s, self._free_s)
        self._free_s = start_s + packet.num_bytes * s_per_byte
        segment_s = packet.segment_bytes * s_per_byte
        return Passage(head_s=start_s + segment_s, tail_s=max(self._free_s, tail_s + segment_s))


class Network(Generic[T]):
    """All hosts. Times are seconds on any clock; outages count from ``start_s`` on it."""

    def __init__(self, hosts: Mapping[str, HostSettings], *, seed: int = 0, start_s: float = 0.0) -> None:
        self.hosts = dict(hosts)
        self.counters = {name: Counters() for name in hosts}
        self._start_s = start_s
        self._ups = {name: self._way(name, seed, up=True) for name in hosts}
        self._downs = {name: self._way(name, seed, up=False) for name in hosts}
        self._held_bytes = 0
        self._number = 0  # breaks ties, so that packets of the same moment keep their order
        self._climbing: list[tuple[float, int, float, Packet[T]]] = []
        self._landing: list[tuple[float, int, Packet[T]]] = []
        self._last_climb_s = dict.fromkeys(hosts, 0.0)
        self._last_landing_s: dict[tuple[str, str], float] = {}
        self._least_delay_s = self._find_least_delay_s()

    @property
    def next_s(self) -> float | None:
        """Before when nothing arrives, as far as is known; ``None`` if nothing is on its way."""
        times = [self._landing[0][0]] if self._landing else []
        if self._climbing:
            times.append(self._climbing[0][0] + self._least_delay_s)
        return min(times, default=None)

    def send(self, now_s: float, packet: Packet[T]) -> Drop | None:
        """Take a packet from its source; tell why if it vanishes before it has left the source's queue."""
        source = self.hosts[packet.source]
        counters = self.counters[packet.source]
        if self._is_out(source, now_s):
            passage: Passage | Drop = Drop.OUTAGE
        elif self._held_bytes + packet.num_bytes > MAX_HELD_BYTES:
            passage = Drop.MEMORY
        else:
            passage = self._ups[packet.source].pass_through(now_s, now_s, packet)
        if isinstance(passage, Drop):
            counters.dropped[passage] += 1
            return passage
        counters.sent_packets += 1
        counters.sent_bytes += packet.num_bytes
        self._held_bytes += packet.num_bytes
        # A delay that became shorter lets no packet overtake the ones before it.
        head_s = max(passage.head_s + source.delay_s, self._last_climb_s[packet.source])
        self._last_climb_s[packet.source] = head_s
        tail_s = max(passage.tail_s + source.delay_s, head_s)
        heapq.heappush(self._climbing, (head_s, self._next_number(), tail_s, packet))
        return None

    def arrivals(self, now_s: float) -> list[Packet[T]]:
        """Let time go on to ``now_s`` and return what has arrived, in order."""
        self._pass_middle(now_s)
        arrived = []
        while self._landing and self._landing[0][0] <= now_s:
            time_s, _, packet = heapq.heappop(self._landing)
            self._held_bytes -= packet.num_bytes
            counters = self.counters[packet.destination]
            if self._is_out(self.hosts[packet.destination], time_s):
                counters.dropped[Drop.OUTAGE] += 1
                continue
            counters.received_packets += 1
            counters.received_bytes += packet.num_bytes
            arrived.append(packet)
        return arrived

    def change(self, now_s: float, name: str, settings: HostSettings) -> None:
        """Connect a host differently from now on; packets that are on a way keep the delay that they set out with."""
        self._pass_middle(now_s)
        self.hosts[name] = settings
        self._least_delay_s = self._find_least_delay_s()
        for way, bits_per_s in (
            (self._ups[name], settings.up_bits_per_s),
            (self._downs[name], settings.down_bits_per_s),
        ):
            way.change(now_s, bits_per_s, settings.queue_limit_bytes(bits_per_s or 0.0), settings.loss)

    def _pass_middle(self, now_s: float) -> None:
        """Queue for their ways down the packets that have come to the middle, in order.

        How late that happens changes nothing, so it needs no waking: it only has to be before they could arrive.
        """
        while self._climbing and self._climbing[0][0] <= now_s:
            head_s, _, tail_s, packet = heapq.heappop(self._climbing)
            self._descend(head_s, tail_s, packet)

    def _find_least_delay_s(self) -> float:
        return min((settings.delay_s for settings in self.hosts.values()), default=0.0)

    def _descend(self, head_s: float, tail_s: float, packet: Packet[T]) -> None:
        destination = self.hosts[packet.destination]
        passage = self._downs[packet.destination].pass_through(head_s, tail_s, packet)
        if isinstance(passage, Drop):
            self.counters[packet.destination].dropped[passage] += 1
            self._held_bytes -= packet.num_bytes
            return
        pair = (packet.source, packet.destination)
        landing_s = max(passage.tail_s + destination.delay_s, self._last_landing_s.get(pair, 0.0))
        self._last_landing_s[pair] = landing_s
        heapq.heappush(self._landing, (landing_s, self._next_number(), packet))

    def _way(self, name: str, seed: int, *, up: bool) -> Way:
        settings = self.hosts[name]
        bits_per_s = settings.up_bits_per_s if up else settings.down_bits_per_s
        chance = random.Random(f"{seed} {name} {up}")  # seeded: the same packets are lost in every run
        return Way(bits_per_s, settings.queue_limit_bytes(bits_per_s or 0.0), settings.loss, chance)

    def _is_out(self, settings: HostSettings, time_s: float) -> bool:
        return bool(settings.outages) and settings.is_out(time_s - self._start_s)

    def _next_number(self) -> int:
        self._number += 1
        return self._number
