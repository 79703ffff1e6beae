"""Compresses the tensors of outgoing messages where that makes them arrive earlier."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Final

from petals_core.wire.compression import MIN_BYTES, SAMPLE_BYTES, Compression, Mode
from petals_core.wire.link_rate import LinkRate
from petals_core.wire.messages import Body, Buffer

_INLINE_BYTES: Final = 256 * 1024
"""What is compressed in the event loop, in less than a millisecond; more goes to a thread."""
_ITEM_BYTES: Final = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}


class Packer:
    """One connection's outgoing tensors."""

    def __init__(self, mode: Mode, rate: LinkRate) -> None:
        self._rate = rate
        self._compression = Compression(mode)
        self.raw_bytes = 0
        """Of tensors that were compressed, before that."""
        self.packed_bytes = 0

    def may_pack(self, body: Body, payload: Sequence[Buffer]) -> bool:
        """Whether a message is worth a closer look; quick."""
        if self._compression.mode == "none" or not payload:
            return False
        return sum(memoryview(each).nbytes for each in payload) >= MIN_BYTES and bool(getattr(body, "tensors", None))

    async def pack(self, body: Body, payload: Sequence[Buffer]) -> tuple[Body, Sequence[Buffer]]:
        """Return the message with those tensors compressed that arrive earlier so; the payload must not change."""
        specs = [list(spec) for spec in getattr(body, "tensors")]  # noqa: B009 - not all bodies have tensors
        message = type(body).__name__
        rest = [memoryview(each).cast("B") for each in payload if memoryview(each).nbytes]
        packed: list[Buffer] = []
        has_changed = False
        for index, spec in enumerate(specs):
            parts = _take(rest, spec[4])
            if parts is None:
                return body, payload  # what is sent contradicts itself: not for us to hide
            kind = f"{message} {index}"
            encoding, compression, num_bytes = spec[2], spec[3], spec[4]
            rate = self._rate.bytes_per_s
            if compression == "none" and self._compression.wants(kind, encoding, num_bytes, rate):
                small = await self._compress(kind, encoding, parts, num_bytes)
                if small.nbytes < num_bytes:
                    self.raw_bytes += num_bytes
                    self.packed_bytes += small.nbytes
                    spec[3:5] = ["zstd", small.nbytes]
                    parts = [small]
                    has_changed = True
            elif compression == "none" and self._compression.wants_sample(kind, encoding, num_bytes, rate):
                await self._compress(kind, encoding, [parts[-1][-SAMPLE_BYTES:]], min(SAMPLE_BYTES, parts[-1].nbytes))
            packed.extend(parts)
        if not has_changed:
            return body, payload
        replace: Any = dataclasses.replace  # the type checker can't know that the body is one with tensors
        return replace(body, tensors=tuple(tuple(spec) for spec in specs)), packed

    async def _compress(self, kind: str, encoding: str, parts: list[memoryview], num_bytes: int) -> memoryview:
        from petals_core.tensors.planes import pack  # NumPy is nothing to a peer that sends no tensors

        item_bytes = _ITEM_BYTES.get(encoding, 1)
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        started_s = time.perf_counter()
        if num_bytes <= _INLINE_BYTES:
            small = pack(whole, item_bytes)
        else:
            small = await asyncio.to_thread(pack, whole, item_bytes)
        self._compression.note(kind, encoding, num_bytes, small.nbytes, time.perf_counter() - started_s)
        return small


def _take(rest: list[memoryview], num_bytes: int) -> list[memoryview] | None:
    """Take so many bytes from the front of ``rest``; None if they are not there."""
    parts: list[memoryview] = []
    while num_bytes:
        if not rest:
            return None
        first = rest[0]
        if first.nbytes > num_bytes:
            parts.append(first[:num_bytes])
            rest[0] = first[num_bytes:]
            break
        parts.append(rest.pop(0))
        num_bytes -= first.nbytes
    return parts
