"""Tensors are compressed on their way where that is asked for, and arrive as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from petals_core.tensors.codec import TensorSpec, decode, encode
from petals_core.testing.network import address_of, dialing, echo, serving
from petals_core.wire.frames import Priority
from petals_core.wire.messages import Forward

Run = Callable[[Any], Any]


def request(*tensors: torch.Tensor, lie: int = 0) -> tuple[Forward, list[memoryview]]:
    specs, payload = [], []
    for tensor in tensors:
        spec, buffers = encode(tensor)
        shape, dtype, encoding, compression, num_bytes = spec.to_wire()
        specs.append((shape, dtype, encoding, compression, num_bytes + lie))
        payload += buffers
    body = Forward(
        fingerprint="f" * 64, start=0, end=1, row_tokens=(len(tensors[0]),), tensors=tuple(specs), deadline_ms=1000
    )
    return body, payload


def smooth(rows: int, seed: int = 0) -> torch.Tensor:
    """Compressible as hidden states are: most exponents are alike."""
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["zstd", "none", "auto"])
def test_what_arrives_is_what_was_sent(run: Run, mode: Any) -> None:
    # One token, more than is compressed in the loop, and two tensors of which one is too small.
    messages = [(smooth(1),), (smooth(4096),), (smooth(512, 1), smooth(2)), (smooth(1, 2),)]

    async def main() -> list[Any]:
        async with serving(echo) as listener, dialing(compression=mode) as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream(Priority.BULK)
            received = []
            for tensors in messages:
                body, payload = request(*tensors)
                await stream.send(body, payload)
                received.append(await stream.receive(timeout_s=20))
            stream.cancel()
            packer = connection.packer
            return [*received, (packer.raw_bytes, packer.packed_bytes)]

    *received, (raw_bytes, packed_bytes) = run(main())
    names = []
    for tensors, message in zip(messages, received, strict=True):
        offset = 0
        for tensor, wire in zip(tensors, message.body.tensors, strict=True):
            spec = TensorSpec.from_wire(wire)
            names.append(spec.compression)
            payload = message.received_payload[offset : offset + spec.num_bytes]
            offset += spec.num_bytes
            assert torch.equal(decode(spec, payload), tensor)
        assert offset == message.received_payload.nbytes
    if mode == "zstd":
        assert names == ["none", "zstd", "zstd", "none", "none"]
        assert packed_bytes < 0.95 * raw_bytes
    elif mode == "none":
        assert set(names) == {"none"}


def test_messages_that_are_compressed_do_not_lose_their_place(run: Run) -> None:
    import asyncio

    async def main() -> list[int]:
        async with serving(echo) as listener, dialing(compression="zstd") as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream(Priority.BULK)
            sizes = [4096, 1, 512, 1, 2048, 1]
            await asyncio.gather(*(stream.send(*request(smooth(size))) for size in sizes))
            rows = [(await stream.receive(timeout_s=20)).body.row_tokens[0] for _ in sizes]
            stream.cancel()
            assert rows == sizes
            return rows

    run(main())


def test_what_contradicts_itself_goes_as_it_is(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as listener, dialing(compression="zstd") as dialer:
            connection = await dialer.connect([address_of(listener)], peer_id=listener.peer_id)
            stream = connection.open_stream(Priority.BULK)
            body, payload = request(smooth(512), lie=4)
            await stream.send(body, payload)
            reply = await stream.receive(timeout_s=20)
            stream.cancel()
            assert reply.body.tensors[0][3:] == body.tensors[0][3:]
            assert reply.received_payload.nbytes == 512 * 64 * 4

    run(main())
