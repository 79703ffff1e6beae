"""Feed the parsers of everything that a peer sends with mutated input, and require documented errors.

    python tools/fuzz_protocol.py --iterations 1000000 --seed 0 --jobs 2

Every iteration takes a valid input of one target and changes it: at random (bits, cuts, splices), or in its structure
(fields of a map, frames of a connection) with the outer layers made valid again: lengths are corrected and
announcements and hellos signed anew, so that the checks behind framing and signature are reached. Prints per target how
many inputs got there, and what came of them; exits with 1 if anything but a documented error was raised or the share
that got there is below ``--min-reach``. The same seed gives the same inputs, whatever ``--jobs`` is.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from petals_core import schema
from petals_core.addresses import Address
from petals_core.announcement import OBSERVED_ID_BYTES, Announcement, SignedAnnouncement
from petals_core.errors import (
    AuthenticationError,
    InvalidAnnouncementError,
    OverloadedError,
    PetalsError,
    ProtocolError,
)
from petals_core.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, verify
from petals_core.limits import WireLimits
from petals_core.next_delays import NextDelays
from petals_core.swarm_key import SwarmKey
from petals_core.testing.mutations import mutated_bytes, mutated_value
from petals_core.wire.connection import Connection, ConnectionClosed
from petals_core.wire.frames import FLAG_BEGIN, FLAG_END, HEAD, HEADER, FrameType, encode_error, encode_frame
from petals_core.wire.hello import ANSWER_BYTES, MAGIC, DialerHello, ListenerHello
from petals_core.wire.inbox import FrameReader
from petals_core.wire.messages import (
    Backward,
    BackwardResult,
    Body,
    Contribution,
    ContributionNoted,
    Failure,
    Forward,
    ForwardResult,
    Info,
    InfoRequest,
    NewAttempt,
    OpenSession,
    OpenTuning,
    Progress,
    ProgressRequest,
    Push,
    Pushed,
    Replay,
    Replayed,
    Route,
    Routed,
    SessionOpened,
    Step,
    StepResult,
    TuningReady,
    UpdateTuning,
    decode_body,
    encode_body,
)

CHUNK_ITERATIONS = 2_000
NOW_S = 1.8e9
SIGNATURE_CONTEXT = b"petals announcement 1\0"
HELLO_CONTEXT = b"petals hello 1\0"
LIMITS = WireLimits(
    max_frame_bytes=4096, max_message_bytes=1 << 16, stream_credit_bytes=1 << 16, connection_credit_bytes=1 << 17
)
SERVER, CLIENT = (Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))
KEY = SwarmKey(b"k" * 32)
NONCE = bytes(range(32))


# --- valid inputs -----------------------------------------------------------------------------------------------------

TENSORS: Any = (("bfloat16", (3, 64), "none", 384),)
RUNS = (((0, 2),), ((5, 1),))
SESSION = bytes(16)
REQUEST: dict[str, Any] = {
    "fingerprint": "ab" * 16,
    "start": 0,
    "end": 4,
    "row_tokens": (2, 1),
    "tensors": TENSORS,
    "deadline_ms": 9,
    "position_runs": RUNS,
    "graph_id": bytes(16),
    "active_adapter": "an-adapter",
    "tuning": bytes(16),
}
BODIES: tuple[Body, ...] = (
    InfoRequest(),
    Info(
        model_name="org/model",
        fingerprint="ab" * 16,
        num_blocks=32,
        start=0,
        end=16,
        state="online",
        torch_dtype="bfloat16",
        quantization="none",
        version="1.0",
        public_name="a name",
        cache_tokens_left=1 << 20,
        num_sessions=3,
    ),
    OpenSession(
        session_id=SESSION,
        fingerprint="ab" * 16,
        start=0,
        end=4,
        num_rows=2,
        max_length=99,
        deadline_ms=1000,
        active_adapter="an-adapter",
        tuning=bytes(16),
    ),
    SessionOpened(cache_tokens_left=5),
    Step(
        step=7,
        keep=3,
        row_tokens=(2, 1),
        tensors=TENSORS,
        deadline_ms=1000,
        row_order=(1, 0),
        position_runs=RUNS,
        attempt=2,
        passes=1,
        hops=((10, 1000, 20_000),),
    ),
    StepResult(step=7, tensors=TENSORS, queue_us=10, compute_us=1000, attempt=2, hops=((10, 1000, 20_000),)),
    Route(
        session_id=SESSION,
        attempt=2,
        deadline_ms=1000,
        is_last=False,
        previous=bytes(32),
        next=bytes(100),
        next_session=SESSION,
    ),
    Routed(),
    NewAttempt(attempt=2),
    Replay(session_id=SESSION, attempt=2, before=7, passes=1, max_tokens=1024, deadline_ms=1000),
    Replayed(last=6),
    ProgressRequest(session_id=SESSION),
    Progress(attempt=2, received=6, computed=5),
    Push(session_id=SESSION),
    Pushed(),
    Forward(**REQUEST),
    ForwardResult(tensors=TENSORS, queue_us=10, compute_us=1000, is_kept=True),
    Backward(**REQUEST),
    BackwardResult(tensors=TENSORS, queue_us=10, compute_us=1000),
    OpenTuning(
        fingerprint="ab" * 16,
        start=0,
        end=4,
        layers=("self_attn.q_proj", "mlp.up_proj"),
        rank=8,
        scaling=2.0,
        values_id=bytes(16),
        tensors=TENSORS,
        deadline_ms=1000,
    ),
    UpdateTuning(values_id=bytes(16), tensors=TENSORS, deadline_ms=1000),
    TuningReady(values_id=bytes(16)),
    Contribution(
        receipt=bytes(100),
        endorsement=bytes(PUBLIC_KEY_BYTES + SIGNATURE_BYTES),
        given=(bytes(100), bytes(120)),
        observed=((bytes(8), 90),),
    ),
    ContributionNoted(weight=2.0, receipt=bytes(100)),
    Failure(code="overloaded", message="no room", retry_after_s=1.5, attempt=2),
)
"""One of each kind."""
ENVELOPES = tuple(encode_body(body) for body in BODIES)
KINDS = frozenset(schema.unpack(envelope)["kind"] for envelope in ENVELOPES)
ANNOUNCEMENT = SignedAnnouncement.sign(
    Announcement(
        model_name="org/model",
        fingerprint="ab" * 16,
        num_blocks=32,
        start=4,
        end=16,
        addresses=(Address("203.0.113.5", 31330), Address("2001:db8::1", 31330)),
        state="online",
        torch_dtype="bfloat16",
        issued_at_s=NOW_S - 10,
        expires_at_s=NOW_S + 600,
        adapters=("an-adapter",),
        inference_tokens_per_s=120.5,
        forward_tokens_per_s=9000.0,
        cache_tokens_left=100_000,
        load=0.5,
        version="1.0",
        public_name="a name",
        next_delays=NextDelays.of([(bytes(32), 0.01)]),
        intent=(8, 20),
        intent_at_s=NOW_S - 5,
        observed=((bytes(OBSERVED_ID_BYTES), 90),),
    ),
    SERVER,
).encoded


def random_frames(random: Random) -> list[bytes]:
    """What a well-behaved dialer may send: streams, messages in one or more frames, control frames."""
    frames = [
        encode_frame(FrameType.OPEN, stream_id=stream_id, flags=random.choice([0, 16, 32])) for stream_id in (1, 3)
    ]
    for stream_id in random.sample((1, 3, 1, 3), 3):
        envelope = random.choice(ENVELOPES)
        payload = bytes(random.choice([0, 10, 300]))
        content = HEAD.pack(len(envelope), len(payload)) + envelope + payload
        cut = random.choice([len(content), random.randrange(8, len(content) + 1)])
        frames.append(encode_frame(FrameType.DATA, content[:cut], stream_id=stream_id, flags=FLAG_BEGIN | 16))
        if cut < len(content):
            frames.append(encode_frame(FrameType.DATA, content[cut:], stream_id=stream_id))
    frames.append(
        random.choice(
            [
                encode_frame(FrameType.PING, bytes(8)),
                encode_frame(FrameType.DATA, stream_id=3, flags=FLAG_END),
                encode_frame(FrameType.CANCEL, encode_error(OverloadedError("x", retry_after_s=1)), stream_id=1),
                encode_frame(FrameType.DRAIN),
                encode_frame(FrameType.CLOSE, encode_error(ProtocolError("x"))),
                encode_frame(FrameType.CLOSE),
            ]
        )
    )
    return frames


# --- mutations --------------------------------------------------------------------------------------------------------


def mutated_envelope(random: Random, envelope: bytes) -> bytes:
    """An envelope changed in its structure (mostly) or its bytes."""
    if random.random() < 0.7:
        try:
            return bytes(msgpack.packb(mutated_value(random, schema.unpack(envelope))))
        except (ValueError, OverflowError):  # what can't be packed, such as too deep a list
            pass
    return mutated_bytes(random, envelope, random.choice(ENVELOPES))


def mutated_frames(random: Random, frames: list[bytes]) -> bytes:
    """The bytes of ``frames`` with one of them changed within valid framing, or with the order changed."""
    index = random.randrange(len(frames))
    length, kind, flags, stream_id = HEADER.unpack_from(frames[index])
    payload = frames[index][HEADER.size :]
    match random.randrange(10):
        case 0:
            del frames[index]
        case 1:
            frames.insert(random.randrange(len(frames)), frames[index])
        case 2:
            random.shuffle(frames)
        case 3:
            stream_id = random.choice((0, 1, 2, 3, 5, (1 << 32) - 1))
            frames[index] = HEADER.pack(length, kind, flags, stream_id) + payload
        case 4:
            frames[index] = HEADER.pack(length, kind, random.choice((0, 1, 2, 3, 17, 33)), stream_id) + payload
        case 5:
            amounts = [random.choice((0, 1, 100, (1 << 32) - 1)) for _ in range(2)]
            credit = struct.pack(">II", *amounts) if random.random() < 0.5 else struct.pack(">I", amounts[0])
            frames.insert(index, encode_frame(FrameType.CREDIT, credit, stream_id=0 if len(credit) == 8 else stream_id))
        case 6 if kind == FrameType.DATA and flags & FLAG_BEGIN:
            sizes = [
                random.choice((0, 1, size, size + 1, 1 << 16, (1 << 32) - 1)) for size in HEAD.unpack_from(payload)
            ]
            frames[index] = HEADER.pack(length, kind, flags, stream_id) + HEAD.pack(*sizes) + payload[HEAD.size :]
        case _ if kind == FrameType.DATA and flags & FLAG_BEGIN:
            envelope = mutated_envelope(random, random.choice(ENVELOPES))
            content = HEAD.pack(len(envelope), 3) + envelope + b"abc"
            frames[index] = encode_frame(FrameType.DATA, content, stream_id=stream_id, flags=flags)
        case _:
            changed = mutated_bytes(random, payload, frames[0])
            frames[index] = HEADER.pack(len(changed), kind, flags, stream_id) + changed
    return b"".join(frames)


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Input:
    """One input, what came of it, and whether it got to the checks behind the framing."""

    target: str
    content: bytes = b""
    has_reached: bool = False
    outcome: str = "accepted"


def fuzz_frames(random: Random, case: Input) -> None:
    frames = random_frames(random)
    valid = b"".join(frames)
    case.content = (
        mutated_frames(random, frames) if random.random() < 0.8 else mutated_bytes(random, valid, valid[::-1])
    )
    case.has_reached = _reaches_past_framing(valid, case.content)
    connection = Connection(is_dialer=False, local_limits=LIMITS, remote_limits=LIMITS, now=0.0)
    cut = random.randrange(len(case.content) + 1)
    events = connection.receive_data(case.content[:cut], 0.0) + connection.receive_data(case.content[cut:], 0.0)
    connection.data_to_send()
    for event in events:
        if isinstance(event, ConnectionClosed) and event.error is not None:
            case.outcome = type(event.error).__name__
            assert isinstance(event.error, PetalsError)
            assert event is events[-1]
    assert connection.is_closed == (bool(events) and isinstance(events[-1], ConnectionClosed))


def _reaches_past_framing(valid: bytes, content: bytes) -> bool:
    """Whether a frame whose header is well-formed holds, or comes behind, the first changed byte."""
    pairs = zip(valid, content, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(valid), len(content)))
    end = 0
    try:
        for header, _ in FrameReader(LIMITS.max_frame_bytes).feed(content):
            end += HEADER.size + header.length
    except ProtocolError:
        pass
    return end > first


def fuzz_envelopes(random: Random, case: Input) -> None:
    case.content = mutated_envelope(random, random.choice(ENVELOPES))
    try:
        content = schema.unpack(case.content)
        kind = content.get("kind") if type(content) is dict else None
        case.has_reached = type(kind) is str and kind in KINDS
    except schema.SchemaError:
        pass
    try:
        body = decode_body(case.content)
    except ProtocolError as error:
        case.outcome = type(error).__name__
    else:
        encoded = encode_body(body)  # compared encoded, for NaN is not equal to itself
        assert encode_body(decode_body(encoded)) == encoded, "a body does not survive the wire"


def fuzz_announcements(random: Random, case: Input) -> None:
    public_key, signature, content = schema.unpack(ANNOUNCEMENT)
    match random.randrange(10):
        case 0 | 1:
            case.content = mutated_bytes(random, ANNOUNCEMENT, content)
        case 2:
            parts = mutated_value(random, [public_key, signature, content])
            try:
                case.content = bytes(msgpack.packb(parts))
            except (ValueError, OverflowError):
                case.content = ANNOUNCEMENT[:-1]
        case _:
            changed = mutated_envelope(random, content)
            signature = SERVER.sign(SIGNATURE_CONTEXT + changed)
            case.content = bytes(msgpack.packb([public_key, signature, changed]))
    case.has_reached = _is_signed(case.content)
    try:
        signed = SignedAnnouncement.decode(case.content, now_s=NOW_S)
    except InvalidAnnouncementError as error:
        case.outcome = type(error).__name__
    else:
        assert signed.encoded == case.content


def _is_signed(content: bytes) -> bool:
    """Whether the outer layer is whole and the signature right, so that only the content decides."""
    try:
        parts = schema.unpack(content)
    except schema.SchemaError:
        return False
    if type(parts) is not tuple or len(parts) != 3 or any(type(part) is not bytes for part in parts):
        return False
    return verify(parts[0], parts[1], SIGNATURE_CONTEXT + parts[2])


def fuzz_hello(random: Random, case: Input) -> None:
    key = random.choice((None, KEY))
    listener = ListenerHello(identity=SERVER, nonce=NONCE, swarm_key=key, limits=LIMITS)
    dialer = DialerHello(identity=CLIENT, listener_id=SERVER.peer_id, nonce=NONCE, swarm_key=key, limits=LIMITS)
    greeting = listener.data_to_send()
    documented = (ProtocolError, AuthenticationError)
    try:
        match random.randrange(4):
            case 0:
                case.content = mutated_bytes(random, greeting, NONCE * 2)
                case.has_reached = case.content[:8] == MAGIC and len(case.content) >= len(greeting)
                dialer.receive_data(case.content)
            case 1:
                dialer.receive_data(greeting)
                listener.receive_data(dialer.data_to_send())
                welcome = random.choice((listener.data_to_send(), b"\x02\x00\x40" + encode_error(OverloadedError("x"))))
                case.content = mutated_bytes(random, welcome, NONCE * 8)
                case.has_reached = case.content[:1] in (b"\x01", b"\x02")
                dialer.receive_data(case.content)
            case 2:
                dialer.receive_data(greeting)
                case.content = mutated_bytes(random, dialer.data_to_send(), NONCE * 8)
                case.has_reached = case.content[:8] == MAGIC and len(case.content) >= ANSWER_BYTES
                listener.receive_data(case.content)
            case _:
                dialer.receive_data(greeting)
                core = bytearray(dialer.data_to_send()[:98])
                core[random.choice((*range(10), *range(74, 98)))] ^= 1 << random.randrange(8)
                transcript = greeting + SERVER.peer_id.digest + bytes(core)
                proof = bytes(32) if key is None else key.proof(b"hello dialer", transcript)
                case.content = bytes(core) + proof + CLIENT.sign(HELLO_CONTEXT + transcript + proof)
                case.has_reached = True
                listener.receive_data(case.content)
    except documented as error:
        case.outcome = type(error).__name__
    except OverloadedError:
        case.outcome = "refused"


TARGETS: dict[str, tuple[Callable[[Random, Input], None], int]] = {
    "frames": (fuzz_frames, 40),
    "envelopes": (fuzz_envelopes, 35),
    "announcements": (fuzz_announcements, 20),
    "hello": (fuzz_hello, 5),
}


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """Sums over iterations."""

    inputs: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.inputs += other.inputs
        self.reached += other.reached
        self.outcomes += other.outcomes
        self.failures += other.failures

    def reach(self, target: str) -> float:
        """Share of a target's inputs that got to the checks behind the framing."""
        return self.reached[target] / max(1, self.inputs[target])


def run_chunk(seed: int, chunk: int, iterations: int) -> Report:
    """Run some iterations; the inputs depend on ``seed`` and ``chunk`` alone."""
    random = Random(f"{seed}/{chunk}")
    report = Report()
    names = random.choices(list(TARGETS), weights=[weight for _, weight in TARGETS.values()], k=iterations)
    for name in names:
        case = Input(name)
        try:
            TARGETS[name][0](random, case)
        except Exception:
            case.outcome = "UNDOCUMENTED"
            report.failures.append(f"{name} {case.content.hex()}\n{traceback.format_exc()}")
        report.inputs[name] += 1
        report.reached[name] += case.has_reached
        report.outcomes[name, case.outcome] += 1
    return report


def run(iterations: int, seed: int, jobs: int = 1) -> Report:
    """Run all iterations, in ``jobs`` processes."""
    chunks = range(-(-iterations // CHUNK_ITERATIONS))
    sizes = [min(CHUNK_ITERATIONS, iterations - chunk * CHUNK_ITERATIONS) for chunk in chunks]
    report = Report()
    if jobs == 1:
        for chunk, size in zip(chunks, sizes, strict=True):
            report.add(run_chunk(seed, chunk, size))
    else:
        with ProcessPoolExecutor(jobs) as pool:
            for part in pool.map(run_chunk, [seed] * len(sizes), chunks, sizes):
                report.add(part)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--min-reach", type=float, default=0.3, help="share that must get past the framing, per target")
    arguments = parser.parse_args()
    started_at = time.perf_counter()
    report = run(arguments.iterations, arguments.seed, arguments.jobs)
    duration_s = time.perf_counter() - started_at
    print(
        f"{arguments.iterations} inputs, seed {arguments.seed}: {duration_s:.0f} s, "
        f"{arguments.iterations / duration_s:.0f}/s in {arguments.jobs} process(es)"
    )
    for target in TARGETS:
        outcomes = {outcome: count for (name, outcome), count in sorted(report.outcomes.items()) if name == target}
        counts = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.items())
        print(f"{target:14s} {report.inputs[target]:8d} inputs, {report.reach(target):6.1%} past the framing: {counts}")
    for failure in report.failures[:5]:
        print(f"\nNOT DOCUMENTED: {failure}", file=sys.stderr)
    too_few = [target for target in TARGETS if report.reach(target) < arguments.min_reach]
    if too_few:
        print(f"too few inputs got past the framing: {', '.join(too_few)}", file=sys.stderr)
    return 1 if report.failures or too_few else 0


if __name__ == "__main__":
    sys.exit(main())
