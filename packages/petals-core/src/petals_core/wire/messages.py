"""What peers say to each other on a stream: the envelopes of requests and replies.

A message is one envelope (a msgpack map with its kind) and a payload: the bytes of the tensors that the envelope
describes, in order, never copied through msgpack. Dimension letters: R rows, T tokens of all rows together, H hidden
size. Hidden states are packed: the tokens of row 0, then those of row 1, and so on, without pads, as one tensor [T, H].
A session's attention cache has columns: a step appends as many as its longest row has new tokens, and each row's tokens
stand at the right end of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from petals_core import schema
from petals_core.announcement import DTYPES, QUANTIZATIONS, STATES
from petals_core.errors import PetalsError, ProtocolError, error_from_wire
from petals_core.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES
from petals_core.limits import (
    MAX_ADAPTER_LAYERS,
    MAX_ADAPTER_RANK,
    MAX_ANNOUNCEMENT_BYTES,
    MAX_BATCH_ROWS,
    MAX_BLOCKS,
    MAX_DEADLINE_S,
    MAX_HOPS,
    MAX_JOINED_TOKENS,
    MAX_MODULE_PATH_CHARS,
    MAX_NAME_CHARS,
    MAX_RECEIPT_BYTES,
    MAX_RECEIPTS_SHOWN,
    MAX_SESSION_TOKENS,
    MAX_STEP_TOKENS,
)
from petals_core.schema import ruled

Buffer: TypeAlias = bytes | bytearray | memoryview
SESSION_ID_BYTES = 16
GRAPH_ID_BYTES = 16
VALUES_ID_BYTES = 16
_MAX_TENSORS = 4
_ENDORSEMENT_BYTES = PUBLIC_KEY_BYTES + SIGNATURE_BYTES
_KIND_KEY = "kind"

_tensors = schema.sequence(lambda value: value, _MAX_TENSORS)
"""Tensor descriptions as they came; ``petals_core.tensors.codec.TensorSpec.from_wire`` checks them."""
_fingerprint = schema.text(64)
_block = schema.integer(0, MAX_BLOCKS)
_deadline_ms = schema.integer(1, 1000 * MAX_DEADLINE_S)
_duration_us = schema.integer(0, 1 << 40)
_session_id = schema.binary(SESSION_ID_BYTES, SESSION_ID_BYTES)
_step = schema.integer(0, 1 << 53)
_attempt = schema.integer(0, 1 << 32)
_passes = schema.integer(0, MAX_HOPS)
_hops = schema.sequence(schema.sequence(_duration_us, 3, 3), MAX_HOPS)
"""Of the servers that a step has passed, in order: queue, compute, and one-way delay to the next; microseconds."""
_row_tokens = schema.sequence(schema.integer(0, MAX_STEP_TOKENS), MAX_BATCH_ROWS, 1)
_graph_id = schema.optional(schema.binary(GRAPH_ID_BYTES, GRAPH_ID_BYTES))
_active_adapter = schema.optional(schema.text(MAX_NAME_CHARS))
_values_id = schema.binary(VALUES_ID_BYTES, VALUES_ID_BYTES)
_position_runs = schema.sequence(
    schema.sequence(schema.pair(schema.integer(0, MAX_SESSION_TOKENS), schema.integer(1, MAX_STEP_TOKENS)), 1024),
    MAX_BATCH_ROWS,
    1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoRequest:
    """Ask a server what it is; also serves to measure the round trip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """A server's answer to ``InfoRequest``."""

    model_name: str = ruled(schema.text(MAX_NAME_CHARS))
    fingerprint: str = ruled(_fingerprint)
    num_blocks: int = ruled(schema.integer(1, MAX_BLOCKS))
    start: int = ruled(_block)
    end: int = ruled(_block)
    state: str = ruled(schema.choice(*STATES))
    torch_dtype: str = ruled(schema.choice(*DTYPES))
    quantization: str = ruled(schema.choice(*QUANTIZATIONS))
    version: str = ruled(schema.text(32))
    public_name: str = ruled(schema.text(MAX_NAME_CHARS))
    cache_tokens_left: int = ruled(schema.integer(0, 1 << 40))
    num_sessions: int = ruled(schema.integer(0, 1 << 32))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSession:
    """Open an inference session on blocks ``start:end``: the first message of a stream whose end closes the session.

    Payload: deep prompts [blocks, 1, P, H], if there are any; they count for the first P tokens of every row.
    """

    session_id: bytes = ruled(_session_id)
    """Random, and of this server alone: who knows it and is named by its client may push steps into the session."""
    fingerprint: str = ruled(_fingerprint)
    start: int = ruled(_block)
    end: int = ruled(_block)
    num_rows: int = ruled(schema.integer(1, MAX_BATCH_ROWS))
    max_length: int = ruled(schema.integer(1, MAX_SESSION_TOKENS))
    """Columns that the session may hold."""
    deadline_ms: int = ruled(_deadline_ms)
    tensors: tuple[Any, ...] | None = ruled(schema.optional(_tensors), default=None)
    active_adapter: str | None = ruled(_active_adapter, default=None)
    """The whole name of an adapter that the server announces; None: the model as it is."""
    tuning: bytes | None = ruled(schema.optional(_values_id), default=None)
    """The values of a tuning session of the same peer by which the blocks are changed."""
    keeps_graphs: bool | None = ruled(schema.optional(schema.boolean), default=None)
    """Steps are forwards of whole rows, which know nothing of each other and leave no cache: the server may keep the
    graph of each, under its :func:`graph_id_of`, for a ``Backward`` of the same peer."""


def graph_id_of(session_id: bytes, step: int) -> bytes:
    """The name of the graph that a step of a session leaves on the server whose session that is."""
    return (int.from_bytes(session_id, "big") ^ (step + 1)).to_bytes(GRAPH_ID_BYTES, "big")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened:
    """The session is open; its attention cache is empty."""

    cache_tokens_left: int = ruled(schema.integer(0, 1 << 40))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Append tokens to a session and compute them. Payload: hidden states [T, H].

    Sent by the client to the first server of a chain, by each server to the next, and to the client by a server that
    can't reach the next, so that the client passes it on as it is.
    """

    step: int = ruled(_step)
    """Counts up in a session; the reply repeats it. A step that is done again keeps its number."""
    keep: int = ruled(schema.integer(0, MAX_SESSION_TOKENS))
    """Cached columns that stay valid; what lies beyond is forgotten first."""
    row_tokens: tuple[int, ...] = ruled(_row_tokens)
    """New tokens of each row; rows may differ, as in a padded batch."""
    tensors: tuple[Any, ...] = ruled(_tensors)
    deadline_ms: int = ruled(_deadline_ms)
    row_order: tuple[int, ...] | None = ruled(
        schema.optional(schema.sequence(schema.integer(0, MAX_BATCH_ROWS - 1), MAX_BATCH_ROWS, 1)), default=None
    )
    """Row i continues what row ``row_order[i]`` was (beam search), applied after ``keep``, and once for each number."""
    position_runs: tuple[tuple[tuple[int, int], ...], ...] | None = ruled(schema.optional(_position_runs), default=None)
    """Per row the position ids of its new tokens as (first, count) runs; None: consecutive from its cached length."""
    attempt: int = ruled(_attempt, default=0)
    """Counts up whenever the client recovers; servers drop steps of an earlier one, and take no later one from others
    before the client has named it."""
    passes: int | None = ruled(schema.optional(_passes), default=None)
    """To how many more servers it goes before it ends, with a result without states; None: to the chain's end."""
    wanted: int | None = ruled(schema.optional(schema.integer(0, MAX_SESSION_TOKENS)), default=None)
    """Of how many columns, the last ones, the result has states; None: of all."""
    join_tokens: int | None = ruled(schema.optional(schema.integer(1, MAX_JOINED_TOKENS)), default=None)
    """A server may compute it at once with the steps before it that it continues, where all of them wait there and have
    no more tokens than these together; None: by itself."""
    is_followed: bool | None = ruled(schema.optional(schema.boolean), default=None)
    """One that continues it, and was computed with it, comes right behind: it is worth while to wait for that."""
    hops: tuple[tuple[int, int, int], ...] | None = ruled(schema.optional(_hops), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Outcome of a ``Step``, to the client. Payload: hidden states [T, H] behind the chain's last block, of the tokens
    that the step wants."""

    step: int = ruled(_step)
    tensors: tuple[Any, ...] = ruled(_tensors)
    """None where the step's ``passes`` ended it, and where it wants none."""
    queue_us: int = ruled(_duration_us)
    """Time between arrival and start of computing."""
    compute_us: int = ruled(_duration_us)
    attempt: int = ruled(_attempt, default=0)
    hops: tuple[tuple[int, int, int], ...] | None = ruled(schema.optional(_hops), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Tell a server where the steps of a session come from and go to. From its client, on a stream of its own.

    What was told before no longer counts; whatever else pushes steps into the session is cut off.
    """

    session_id: bytes = ruled(_session_id)
    attempt: int = ruled(_attempt)
    deadline_ms: int = ruled(_deadline_ms)
    is_last: bool = ruled(schema.boolean)
    """Whether outputs are results for the client."""
    previous: bytes | None = ruled(schema.optional(schema.binary(32, 32)), default=None)
    """The peer that may push steps; None: the client alone sends them."""
    next: bytes | None = ruled(schema.optional(schema.binary(1, MAX_ANNOUNCEMENT_BYTES)), default=None)
    """Announcement of the server that outputs are pushed to; None: the client passes them on."""
    next_session: bytes | None = ruled(schema.optional(_session_id), default=None)
    """The session's id there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Steps take that way from now on; the next server, if there is one, has been reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAttempt:
    """The client has begun a new attempt, in which the server keeps its place. On the session's stream, no answer."""

    attempt: int = ruled(_attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Send the outputs that a server has kept of a session once more, in few large steps. From the session's client."""

    session_id: bytes = ruled(_session_id)
    attempt: int = ruled(_attempt)
    before: int = ruled(_step)
    """Of the steps with lower numbers."""
    passes: int = ruled(_passes)
    """Of the steps that are sent."""
    max_tokens: int = ruled(schema.integer(1, MAX_STEP_TOKENS))
    """Of one step."""
    deadline_ms: int = ruled(_deadline_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """The outputs are on their way."""

    last: int | None = ruled(schema.optional(_step), default=None)
    """Number of the last step that was sent; None: there was nothing to send."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRequest:
    """Ask a server how far a session is: answered at once, also while the device computes."""

    session_id: bytes = ruled(_session_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a session is."""

    attempt: int = ruled(_attempt)
    received: int | None = ruled(schema.optional(_step), default=None)
    """Number of the last step that has arrived in this attempt."""
    computed: int | None = ruled(schema.optional(_step), default=None)
    """Number of the last step that was computed in this attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """The first message of a stream from one server to the next: a session's steps follow, without answers."""

    session_id: bytes = ruled(_session_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """Steps may follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Compute blocks ``start:end`` on whole rows without a session. Payload: hidden states [T, H].

    A second tensor are deep prompts [blocks, 1 or R, P, H]: those of a block are added to the states of each row's
    first P tokens before it.
    """

    fingerprint: str = ruled(_fingerprint)
    start: int = ruled(_block)
    end: int = ruled(_block)
    row_tokens: tuple[int, ...] = ruled(_row_tokens)
    tensors: tuple[Any, ...] = ruled(_tensors)
    deadline_ms: int = ruled(_deadline_ms)
    position_runs: tuple[tuple[tuple[int, int], ...], ...] | None = ruled(schema.optional(_position_runs), default=None)
    graph_id: bytes | None = ruled(_graph_id, default=None)
    """A random name for what a ``Backward`` needs of this computation, which the server may keep for a while."""
    active_adapter: str | None = ruled(_active_adapter, default=None)
    """The whole name of an adapter that the server announces; None: the model as it is."""
    tuning: bytes | None = ruled(schema.optional(_values_id), default=None)
    """The values of a tuning session of the same peer by which the blocks are changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """Outcome of a ``Forward``. Payload: hidden states [T, H]."""

    tensors: tuple[Any, ...] = ruled(_tensors)
    queue_us: int = ruled(_duration_us)
    compute_us: int = ruled(_duration_us)
    is_kept: bool | None = ruled(schema.optional(schema.boolean), default=None)
    """Whether the server has kept the graph that the request named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward:
    """Gradients of blocks ``start:end`` with respect to what a ``Forward`` was given.

    Payload: the gradient of the loss with respect to the hidden states behind the last block [T, H]. With the name of a
    kept graph nothing else; the graph is used up by it. Without one the hidden states [T, H] that went in follow, and
    the deep prompts if there were any; ``active_adapter`` and ``tuning`` are those of the forward.
    """

    fingerprint: str = ruled(_fingerprint)
    start: int = ruled(_block)
    end: int = ruled(_block)
    row_tokens: tuple[int, ...] = ruled(_row_tokens)
    tensors: tuple[Any, ...] = ruled(_tensors)
    deadline_ms: int = ruled(_deadline_ms)
    position_runs: tuple[tuple[tuple[int, int], ...], ...] | None = ruled(schema.optional(_position_runs), default=None)
    graph_id: bytes | None = ruled(_graph_id, default=None)
    active_adapter: str | None = ruled(_active_adapter, default=None)
    """The whole name of an adapter that the server announces; None: the model as it is."""
    tuning: bytes | None = ruled(schema.optional(_values_id), default=None)
    """The values of a tuning session of the same peer by which the blocks are changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardResult:
    """Outcome of a ``Backward``. Payload: gradient of the hidden states [T, H], of the deep prompts if there were any,
    and of the values [V] of a tuning session for blocks ``start:end`` if these changed the blocks."""

    tensors: tuple[Any, ...] = ruled(_tensors)
    queue_us: int = ruled(_duration_us)
    compute_us: int = ruled(_duration_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTuning:
    """Let the server hold low-rank matrices of the client's for blocks ``start:end``, as long as the stream lasts.

    Payload: their values [V], as ``petals_core.models.low_rank.LoraLayout`` orders them.
    """

    fingerprint: str = ruled(_fingerprint)
    start: int = ruled(_block)
    end: int = ruled(_block)
    layers: tuple[str, ...] = ruled(
        schema.sequence(schema.text(MAX_MODULE_PATH_CHARS), MAX_ADAPTER_LAYERS, 1),
    )
    """Paths in a block of the linear layers that they change, in blocks that have such a layer."""
    rank: int = ruled(schema.integer(1, MAX_ADAPTER_RANK))
    scaling: float = ruled(schema.number(-1e6, 1e6))
    values_id: bytes = ruled(_values_id)
    """The client's name for these values, by which requests on other streams ask for them."""
    tensors: tuple[Any, ...] = ruled(_tensors)
    deadline_ms: int = ruled(_deadline_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateTuning:
    """Other values in the place of those before, on the stream of the ``OpenTuning``. Payload: [V]."""

    values_id: bytes = ruled(_values_id)
    tensors: tuple[Any, ...] = ruled(_tensors)
    deadline_ms: int = ruled(_deadline_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningReady:
    """The server holds these values, and those before no more."""

    values_id: bytes = ruled(_values_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A client signs for what a server computed for it, and shows what it gave to others (``petals_core.receipts``)."""

    receipt: bytes | None = ruled(schema.optional(schema.binary(1, MAX_RECEIPT_BYTES)), default=None)
    """With the client's signature; the server is to add its own."""
    endorsement: bytes | None = ruled(
        schema.optional(schema.binary(_ENDORSEMENT_BYTES, _ENDORSEMENT_BYTES)), default=None
    )
    """By the server whose receipts ``given`` are, for this client."""
    given: tuple[bytes, ...] = ruled(
        schema.sequence(schema.binary(1, MAX_RECEIPT_BYTES), MAX_RECEIPTS_SHOWN), default=()
    )
    """Receipts with both signatures."""
    observed: tuple[tuple[bytes, int], ...] = ruled(
        schema.sequence(schema.pair(schema.binary(8, 8), schema.integer(0, 100)), MAX_RECEIPTS_SHOWN), default=()
    )
    """Of other servers, by the beginning of their id: percent of the announced speed that this client saw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionNoted:
    """A server's answer to ``Contribution``."""

    weight: float = ruled(schema.number(0, 100))
    """Of the client in the fair shares of the server; 1 is everybody's."""
    receipt: bytes | None = ruled(schema.optional(schema.binary(1, MAX_RECEIPT_BYTES)), default=None)
    """With both signatures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The request failed; the stream stays usable unless it ends with this message."""

    code: str = ruled(schema.text(64))
    message: str = ruled(schema.text(1024))
    retry_after_s: float | None = ruled(schema.optional(schema.number(0, 86400)), default=None)
    attempt: int | None = ruled(schema.optional(_attempt), default=None)
    """Of a step that failed; those of the same attempt that follow it are dropped."""

    @classmethod
    def of(cls, error: PetalsError) -> Failure:
        """Describe an error to the peer, in one printable line."""
        line = "".join(character if character.isprintable() else " " for character in error.message)[:1024]
        return cls(code=error.code, message=line, retry_after_s=error.retry_after_s, attempt=error.attempt)

    def to_error(self) -> PetalsError:
        """The error that the peer reported."""
        error = error_from_wire(self.code, self.message, self.retry_after_s)
        error.attempt = self.attempt
        return error


Body: TypeAlias = (
    InfoRequest
    | Info
    | OpenSession
    | SessionOpened
    | Step
    | StepResult
    | Route
    | Routed
    | NewAttempt
    | Replay
    | Replayed
    | ProgressRequest
    | Progress
    | Push
    | Pushed
    | Forward
    | ForwardResult
    | Backward
    | BackwardResult
    | OpenTuning
    | UpdateTuning
    | TuningReady
    | Contribution
    | ContributionNoted
    | Failure
)
_KINDS: dict[str, type[Body]] = {
    "info?": InfoRequest,
    "info": Info,
    "open?": OpenSession,
    "open": SessionOpened,
    "step?": Step,
    "step": StepResult,
    "route?": Route,
    "route": Routed,
    "attempt": NewAttempt,
    "replay?": Replay,
    "replay": Replayed,
    "progress?": ProgressRequest,
    "progress": Progress,
    "push?": Push,
    "push": Pushed,
    "forward?": Forward,
    "forward": ForwardResult,
    "backward?": Backward,
    "backward": BackwardResult,
    "tune?": OpenTuning,
    "values?": UpdateTuning,
    "tuned": TuningReady,
    "contribution?": Contribution,
    "contribution": ContributionNoted,
    "failure": Failure,
}
_NAMES = {body: name for name, body in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Message:
    """An envelope and the bytes beside it."""

    body: Body
    payload: Sequence[Buffer] = ()
    """Buffers to send one behind the other; a received message has at most one."""

    @property
    def received_payload(self) -> memoryview:
        """The whole payload of a received message."""
        return memoryview(self.payload[0]) if self.payload else memoryview(b"")


def encode_body(body: Body) -> bytes:
    """Return the envelope's bytes."""
    content = schema.to_map(body)
    content[_KIND_KEY] = _NAMES[type(body)]
    return schema.pack(content)


def decode_body(envelope: Buffer) -> Body:
    """Read an envelope from an untrusted peer.

    Raises:
        ProtocolError: it is not a known, well-formed message.
    """
    try:
        content = schema.unpack(envelope)
        kind = content.get(_KIND_KEY) if type(content) is dict else None
        body = _KINDS.get(kind) if type(kind) is str else None
        if body is None:
            raise schema.SchemaError("unknown kind of message")
        return schema.from_map(body, content)
    except schema.SchemaError as error:
        raise ProtocolError(f"malformed message: {error}") from None
