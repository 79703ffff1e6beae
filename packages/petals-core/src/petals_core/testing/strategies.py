"""Hypothesis strategies for the values that peers exchange. Needs ``hypothesis``, which only tests install."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from petals_core.addresses import Address
from petals_core.announcement import DTYPES, QUANTIZATIONS, STATES, Announcement
from petals_core.limits import MAX_ANNOUNCEMENT_LIFETIME_S, MAX_BLOCKS, MAX_JOINED_TOKENS, WireLimits
from petals_core.next_delays import NextDelays
from petals_core.wire.frames import Priority
from petals_core.wire.messages import (
    GRAPH_ID_BYTES,
    SESSION_ID_BYTES,
    Backward,
    BackwardResult,
    Body,
    Failure,
    Forward,
    ForwardResult,
    Info,
    InfoRequest,
    OpenSession,
    SessionOpened,
    Step,
    StepResult,
)

_MAX_LISTED = 4
"""Lists are kept short, for it is their shape and not their length that finds faults."""


def printable(max_chars: int) -> st.SearchStrategy[str]:
    """Text that a terminal can show, of any script."""
    characters = st.characters(exclude_categories=("C", "Z"))
    return st.text(characters, max_size=min(max_chars, 12)).filter(str.isprintable)


def spans() -> st.SearchStrategy[tuple[int, int, int]]:
    """(start, end, num_blocks) of a span that is not empty."""
    return st.lists(st.integers(0, MAX_BLOCKS), min_size=3, max_size=3).map(sorted).map(_as_span)


def _as_span(numbers: list[int]) -> tuple[int, int, int]:
    start = min(numbers[0], MAX_BLOCKS - 1)
    end = max(numbers[1], start + 1)
    return start, end, max(numbers[2], end)


def tensor_descriptions() -> st.SearchStrategy[tuple[Any, ...]]:
    """What an envelope carries of tensors: any msgpack value, for the codec checks it."""
    scalars = st.none() | st.booleans() | st.integers(-(1 << 31), 1 << 63) | printable(8) | st.binary(max_size=8)
    return st.lists(scalars | st.tuples(scalars, scalars), max_size=_MAX_LISTED).map(tuple)


def row_tokens() -> st.SearchStrategy[tuple[int, ...]]:
    """New tokens of each row."""
    return st.lists(st.integers(0, 1 << 20), min_size=1, max_size=_MAX_LISTED).map(tuple)


def position_runs() -> st.SearchStrategy[tuple[tuple[tuple[int, int], ...], ...] | None]:
    """Runs of position ids for each row."""
    run = st.tuples(st.integers(0, 1 << 22), st.integers(1, 1 << 20))
    row = st.lists(run, max_size=_MAX_LISTED).map(tuple)
    return st.none() | st.lists(row, min_size=1, max_size=_MAX_LISTED).map(tuple)


_GRAPH_IDS = st.none() | st.binary(min_size=GRAPH_ID_BYTES, max_size=GRAPH_ID_BYTES)
_DEADLINES_MS = st.integers(1, 3_600_000)
_DURATIONS_US = st.integers(0, 1 << 40)
_BLOCKS = st.integers(0, MAX_BLOCKS)


def bodies() -> st.SearchStrategy[Body]:
    """Every kind of message body."""
    return st.one_of(
        st.just(InfoRequest()),
        st.builds(
            Info,
            model_name=printable(128),
            fingerprint=printable(64),
            num_blocks=st.integers(1, MAX_BLOCKS),
            start=_BLOCKS,
            end=_BLOCKS,
            state=st.sampled_from(STATES),
            torch_dtype=st.sampled_from(DTYPES),
            quantization=st.sampled_from(QUANTIZATIONS),
            version=printable(32),
            public_name=printable(128),
            cache_tokens_left=st.integers(0, 1 << 40),
            num_sessions=st.integers(0, 1 << 32),
        ),
        st.builds(
            OpenSession,
            session_id=st.binary(min_size=SESSION_ID_BYTES, max_size=SESSION_ID_BYTES),
            fingerprint=printable(64),
            start=_BLOCKS,
            end=_BLOCKS,
            num_rows=st.integers(1, 1024),
            max_length=st.integers(1, 1 << 22),
            deadline_ms=_DEADLINES_MS,
            tensors=st.none() | tensor_descriptions(),
        ),
        st.builds(SessionOpened, cache_tokens_left=st.integers(0, 1 << 40)),
        st.builds(
            Step,
            step=st.integers(0, 1 << 53),
            keep=st.integers(0, 1 << 22),
            row_tokens=row_tokens(),
            tensors=tensor_descriptions(),
            deadline_ms=_DEADLINES_MS,
            row_order=st.none() | st.lists(st.integers(0, 1023), min_size=1, max_size=_MAX_LISTED).map(tuple),
            position_runs=position_runs(),
            join_tokens=st.none() | st.integers(1, MAX_JOINED_TOKENS),
            is_followed=st.none() | st.booleans(),
        ),
        st.builds(
            StepResult,
            step=st.integers(0, 1 << 53),
            tensors=tensor_descriptions(),
            queue_us=_DURATIONS_US,
            compute_us=_DURATIONS_US,
        ),
        st.builds(
            Forward,
            fingerprint=printable(64),
            start=_BLOCKS,
            end=_BLOCKS,
            row_tokens=row_tokens(),
            tensors=tensor_descriptions(),
            deadline_ms=_DEADLINES_MS,
            position_runs=position_runs(),
            graph_id=_GRAPH_IDS,
        ),
        st.builds(
            ForwardResult,
            tensors=tensor_descriptions(),
            queue_us=_DURATIONS_US,
            compute_us=_DURATIONS_US,
            is_kept=st.none() | st.booleans(),
        ),
        st.builds(
            Backward,
            fingerprint=printable(64),
            start=_BLOCKS,
            end=_BLOCKS,
            row_tokens=row_tokens(),
            tensors=tensor_descriptions(),
            deadline_ms=_DEADLINES_MS,
            position_runs=position_runs(),
            graph_id=_GRAPH_IDS,
        ),
        st.builds(BackwardResult, tensors=tensor_descriptions(), queue_us=_DURATIONS_US, compute_us=_DURATIONS_US),
        st.builds(
            Failure,
            code=st.sampled_from(("overloaded", "remote_failure", "wrong_model", "something new")),
            message=printable(1024),
            retry_after_s=st.none() | st.floats(0, 86400),
        ),
    )


def addresses() -> st.SearchStrategy[Address]:
    """Names, IPv4 and IPv6 addresses with a port."""
    name = st.from_regex(r"[a-z][a-z0-9]{0,8}(\.[a-z][a-z0-9]{0,5}){0,2}", fullmatch=True)
    host = name | st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
    return st.builds(Address, host, st.integers(1, 65535))


@st.composite
def announcements(draw: st.DrawFn, now_s: float = 1.8e9) -> Announcement:
    """Announcements that are live at ``now_s`` and fit a datagram."""
    start, end, num_blocks = draw(spans())
    issued_at_s = now_s - draw(st.floats(0, MAX_ANNOUNCEMENT_LIFETIME_S / 2))
    rates = st.none() | st.floats(0, 1e12)
    delays = st.tuples(st.binary(min_size=32, max_size=32), st.floats(0, 60))
    return Announcement(
        model_name=draw(printable(128)),
        fingerprint=draw(printable(64)),
        num_blocks=num_blocks,
        start=start,
        end=end,
        addresses=tuple(draw(st.lists(addresses(), max_size=2))),
        state=draw(st.sampled_from(STATES)),
        torch_dtype=draw(st.sampled_from(DTYPES)),
        issued_at_s=issued_at_s,
        expires_at_s=now_s + draw(st.floats(1, MAX_ANNOUNCEMENT_LIFETIME_S / 2)),
        quantization=draw(st.sampled_from(QUANTIZATIONS)),
        adapters=tuple(draw(st.lists(printable(128), max_size=2))),
        inference_tokens_per_s=draw(rates),
        forward_tokens_per_s=draw(rates),
        cache_tokens_left=draw(st.none() | st.integers(0, 1 << 40)),
        load=draw(st.none() | st.floats(0, 1e6)),
        version=draw(printable(32)),
        public_name=draw(printable(128)),
        next_delays=NextDelays.of(draw(st.lists(delays, max_size=2))),
    )


def priorities() -> st.SearchStrategy[Priority]:
    """Any priority."""
    return st.sampled_from(Priority)


def small_limits() -> st.SearchStrategy[WireLimits]:
    """Limits so tight that a few messages reach them."""
    return st.builds(
        dataclasses.replace,
        st.just(WireLimits(max_envelope_bytes=8192, max_message_bytes=64 * 1024)),
        max_frame_bytes=st.integers(1024, 8192),
        max_streams=st.integers(4, 8),
        stream_credit_bytes=st.integers(1024, 16384),
        connection_credit_bytes=st.integers(1024, 32768),
    )


@st.composite
def splits(draw: st.DrawFn, data: bytes, max_cuts: int = 12) -> list[bytes]:
    """``data`` cut into pieces anywhere, empty ones included."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=max_cuts)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
