"""What holds for two connections whatever is done to them and however the bytes between them are cut."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from petals_core.errors import ProtocolError
from petals_core.limits import WireLimits
from petals_core.testing.pair import Pair
from petals_core.testing.strategies import bodies, priorities, small_limits, splits
from petals_core.wire.connection import Connection
from petals_core.wire.credit import lane_of, message_cost
from petals_core.wire.events import ConnectionClosed, Event, MessageReceived, StreamCancelled
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Body, Message, SessionOpened


def operations(random: Random, count: int) -> Iterator[tuple[object, ...]]:
    """Things that applications and the network do, in such a mix that credit runs out and streams come and go."""
    for _ in range(count):
        end, pick, priority = random.randrange(2), random.randrange(1000), random.choice(list(Priority))
        kind = random.choices(
            ["open", "send", "end", "cancel", "move", "take", "ping"], weights=[8, 30, 2, 4, 40, 15, 1]
        )[0]
        match kind:
            case "open":
                yield kind, end, priority
            case "send":
                yield kind, end, pick, random.choice([0, 100, 1000, 5000, 40_000]), priority, random.random() < 0.05
            case "move":
                yield kind, end, random.choice([1, 1000, 20_000]), random.choice([100, 3000, 50_000])
            case _:
                yield kind, end, pick


class Run:
    """A pair, and what was sent on it."""

    def __init__(self, limits: tuple[WireLimits, WireLimits]) -> None:
        self.limits = limits
        self.pair = Pair(*limits)
        self.streams: list[int] = []
        self.cancelled: set[int] = set()
        self.sent: tuple[dict[int, list[bytes]], dict[int, list[bytes]]] = (defaultdict(list), defaultdict(list))
        self.received: tuple[dict[int, list[bytes]], dict[int, list[bytes]]] = (defaultdict(list), defaultdict(list))
        self.count = 0

    def do(self, operation: tuple[object, ...]) -> None:
        match operation:
            case ("open", int(end), Priority() as priority):
                others = self.limits[1 - end]
                connection = self.pair.ends[end]
                own = sum(connection.is_open(stream_id) for stream_id in self.streams if stream_id % 2 != end)
                if own < others.max_streams:
                    self.streams.append(connection.open_stream(priority))
            case ("send", int(end), int(pick), int(size), Priority() as priority, bool(ends)):
                connection = self.pair.ends[end]
                stream_id = self.pick(pick)
                if stream_id is not None and connection._outbox.takes(stream_id):
                    self.count += 1
                    payload = self.count.to_bytes(4, "big") + bytes(size)
                    connection.send_message(
                        stream_id, SessionOpened(cache_tokens_left=1), [payload], end=ends, priority=priority
                    )
                    self.sent[end][stream_id].append(payload)
            case ("end", int(end), int(pick)):
                if (stream_id := self.pick(pick)) is not None:
                    self.pair.ends[end].end_stream(stream_id)
            case ("cancel", int(end), int(pick)):
                stream_id = self.pick(pick)
                if stream_id is not None and self.pair.ends[end].is_open(stream_id):
                    self.pair.ends[end].cancel_stream(stream_id)
                    self.cancelled.add(stream_id)
            case ("move", int(end), int(max_bytes), int(piece_bytes)):
                self.pair.move(end, max_bytes, piece_bytes)
            case ("take", int(end), _):
                self.take(end)
            case ("ping", int(end), _):
                self.pair.ends[end].ping(self.pair.now)
        for end in (0, 1):
            self.check_memory(end)

    def pick(self, number: int) -> int | None:
        streams = [
            stream_id for stream_id in self.streams[-20:] if any(end.is_open(stream_id) for end in self.pair.ends)
        ]
        return streams[number % len(streams)] if streams else None

    def take(self, end: int) -> bool:
        event = self.pair.take(end)
        if event is not None:
            self.received[end][event.stream_id].append(bytes(event.message.received_payload))
        return event is not None

    def check_memory(self, end: int) -> None:
        """What one end holds never exceeds its credit by a message or more."""
        limits = self.limits[end]
        lanes = [0, 0]
        streams: dict[int, int] = defaultdict(int)
        largest = message_cost(100, 40_004)
        for event in self.pair.untaken[end]:
            lanes[lane_of(event.priority, event.cost, limits.stream_credit_bytes)] += event.cost
            streams[event.stream_id] += event.cost
        for stream_id, stream in self.pair.ends[end]._streams.items():
            if stream.assembly is not None:
                assembly = stream.assembly
                lanes[lane_of(assembly.priority, assembly.cost, limits.stream_credit_bytes)] += assembly.cost
                streams[stream_id] += assembly.cost
        assert max(lanes) < limits.connection_credit_bytes + largest
        assert max(streams.values(), default=0) < limits.stream_credit_bytes + largest

    def settle(self) -> None:
        while self.pair.move(0) + self.pair.move(1) or self.take(0) or self.take(1):
            pass


@settings(max_examples=25)
@given(st.tuples(small_limits(), small_limits()), st.integers(0, 1 << 32))
def test_nothing_locks_and_everything_arrives_in_order(limits: tuple[WireLimits, WireLimits], seed: int) -> None:
    run = Run(limits)
    for operation in operations(Random(seed), 300):
        run.do(operation)
    run.settle()
    for end, connection in enumerate(run.pair.ends):
        assert not connection.is_closed
        assert connection.data_to_send() == []
        assert connection._keepalive._sent_at == {}
        for stream_id in run.streams:
            assert connection.queued_bytes(stream_id) == 0
            sent, received = run.sent[1 - end][stream_id], run.received[end][stream_id]
            assert received == (sent[: len(received)] if stream_id in run.cancelled else sent)
    for stream_id in run.streams:
        assert run.pair.dialer.is_open(stream_id) == run.pair.listener.is_open(stream_id)
        run.pair.dialer.end_stream(stream_id)
        run.pair.listener.end_stream(stream_id)
    run.settle()
    for end, connection in enumerate(run.pair.ends):
        assert connection.num_streams == 0
        for account, line in zip(connection._outbox._lanes, connection._outbox._waiting, strict=True):
            assert account.is_open, "credit was lost"
            assert not line
        outstanding = [account.outstanding_bytes for account in connection._outbox._lanes]
        assert outstanding == [account.outstanding_bytes for account in run.pair.ends[1 - end]._lanes]


MESSAGES = st.lists(
    st.tuples(st.integers(0, 3), bodies(), st.binary(max_size=3000), priorities(), st.booleans()), max_size=8
)


def dialed(messages: list[tuple[int, Body, bytes, Priority, bool]]) -> bytes:
    """All bytes of a dialer that opens four streams and sends such messages on them."""
    limits = dataclasses.replace(WireLimits(), max_frame_bytes=1024)
    connection = Connection(is_dialer=True, local_limits=limits, remote_limits=limits, now=0.0)
    streams = [connection.open_stream() for _ in range(4)]
    for number, body, payload, priority, end in messages:
        if connection._outbox.takes(streams[number]):
            connection.send_message(streams[number], body, [payload], end=end, priority=priority)
    connection.ping(0.0)
    connection.cancel_stream(streams[3])
    connection.drain()
    data = b""
    while buffers := connection.data_to_send():
        data += b"".join(buffers)
    return data


def heard(pieces: list[bytes]) -> tuple[list[Event], bytes]:
    """The events of a fresh listener, with payloads as plain bytes, and what it answers."""
    limits = dataclasses.replace(WireLimits(), max_frame_bytes=1024)
    connection = Connection(is_dialer=False, local_limits=limits, remote_limits=limits, now=0.0)
    events = [plain(event) for piece in pieces for event in connection.receive_data(piece, 0.0)]
    return events, b"".join(connection.data_to_send())


def plain(event: Event) -> Event:
    match event:
        case MessageReceived(message=message):
            payload = (bytes(message.received_payload),)
            return dataclasses.replace(event, message=Message(message.body, payload))
        case StreamCancelled(stream_id, error):
            return StreamCancelled(stream_id, (type(error), error.message))  # type: ignore[arg-type]
        case ConnectionClosed(error) if error is not None:
            return ConnectionClosed((type(error), error.message))  # type: ignore[arg-type]
        case _:
            return event


@settings(max_examples=60)
@given(MESSAGES, st.data())
def test_any_split_of_the_bytes_gives_the_same_events(
    messages: list[tuple[int, Body, bytes, Priority, bool]], data: st.DataObject
) -> None:
    sent = dialed(messages)
    assert heard(data.draw(splits(sent))) == heard([sent])


@settings(max_examples=60)
@given(MESSAGES, st.data())
def test_changed_bytes_raise_nothing_whatever_the_split(
    messages: list[tuple[int, Body, bytes, Priority, bool]], data: st.DataObject
) -> None:
    sent = bytearray(dialed(messages))
    for _ in range(data.draw(st.integers(1, 4))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    changed = bytes(sent)
    assert heard(data.draw(splits(changed))) == heard([changed])


@given(st.binary(max_size=100))
def test_garbage_closes_the_connection_or_is_an_unfinished_frame(content: bytes) -> None:
    events, answer = heard([content])
    for event in events:
        if isinstance(event, ConnectionClosed) and event.error is not None:
            assert issubclass(event.error[0], ProtocolError)  # type: ignore[index]
            assert answer
