"""Weights are packed again after a quiet time, between the steps of others, and gradients come before that."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petals_core.errors import DeadlineExceededError, OverloadedError
from petals_core.identity import Identity
from petals_core.net.rpc import call
from petals_core.tensors.codec import TensorSpec, decode, encode
from petals_core.testing.factories import make_checkpoint
from petals_core.testing.network import run_clean
from petals_core.wire.messages import Backward, BackwardResult, Forward, ForwardResult, Message
from petals_server.config import ServerLimits
from petals_server.engine import Engine
from petals_server.execution import linear
from petals_server.execution.linear import Linear
from petals_server.execution.packing import Packing, packing_of
from petals_server.graphs import Graph, GraphStore
from petals_server.quiet_time import QUIET_S
from petals_server.repacking import Repacking
from petals_server.testing import Client, random_states, served, until
from petals_server.threads import ThreadPlan

THREADS = ThreadPlan(decode=1, bulk=1, decode_tokens_per_s=1, bulk_tokens_per_s=1)
NUM_LAYERS = 3
GRAPH_S = 1000.0


class Gate:
    """Holds weights, and lets the device's thread begin to change a layer only when it may."""

    def __init__(self, error: Exception | None = None) -> None:
        self.num_changes = 0
        self.error = error
        """Raised instead of the next change."""
        self._is_shut = False
        self._reached, self._may_pass = threading.Event(), threading.Event()

    def forget(self) -> None:
        if self._is_shut:
            self._reached.set()
            self._may_pass.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.num_changes += 1

    def shut(self) -> None:
        self._is_shut = True

    async def reached(self) -> None:
        """Wait until a change stands before the gate."""
        await asyncio.to_thread(self._reached.wait)

    def open(self) -> None:
        self._is_shut = False
        self._may_pass.set()


class Bench:
    """An engine, and weights that it keeps in the form that is wanted."""

    def __init__(self) -> None:
        layers = [nn.Linear(512, 512, device="meta").to_empty(device="cpu") for _ in range(NUM_LAYERS)]
        for layer in layers:
            layer.__class__ = Linear
        self.packing = Packing([layer for layer in layers if isinstance(layer, Linear)])
        self.gate = Gate()
        self.packing.tell(self.gate)
        self.graphs = GraphStore(budget_bytes=1 << 20, lifetime_s=GRAPH_S)
        self.engine = Engine(ServerLimits())
        self.weights = Repacking(self.packing, THREADS, engine=self.engine, graphs=self.graphs)

    async def want(self) -> None:
        """Compute a gradient."""
        async with self.weights.unpacked(deadline_s=time.monotonic() + 1000):
            assert await self.engine.call(lambda: self.packing.is_plain)

    async def look(self, later_s: float) -> None:
        """What happens so much later."""
        self.weights.look(time.monotonic() + later_s)
        await self.weights.settle()


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    try:
        yield made
    finally:
        await made.weights.close()
        await made.engine.close()


def test_weights_are_packed_again_after_the_quiet_time_and_not_before() -> None:
    async def run() -> None:
        async with bench() as made:
            for _ in range(2):
                await made.want()
                await made.look(QUIET_S - 10)
                assert made.packing.is_plain
                await made.want()
                await made.look(QUIET_S)
                assert made.packing.is_whole
            assert made.gate.num_changes == 4 * NUM_LAYERS

    run_clean(run())


def test_weights_that_a_kept_graph_holds_are_packed_when_it_is_gone() -> None:
    async def run() -> None:
        async with bench() as made:
            await made.want()
            made.graphs.keep(b"g", Graph(peer_id=Identity.ephemeral().peer_id), now_s=0.0)
            await made.look(QUIET_S)
            assert made.packing.is_plain
            made.graphs.drop_expired(now_s=GRAPH_S)
            await made.look(QUIET_S)
            assert made.packing.is_whole

    run_clean(run())


def test_a_gradient_that_comes_while_weights_are_packed_goes_first() -> None:
    async def run() -> None:
        async with bench() as made:
            await made.want()
            made.gate.shut()
            made.weights.look(time.monotonic() + QUIET_S)
            await made.gate.reached()
            gradients = [asyncio.create_task(made.want()) for _ in range(2)]
            await asyncio.sleep(0)
            made.gate.open()
            await asyncio.gather(*gradients)
            await made.weights.settle()
            assert made.packing.is_plain
            assert made.gate.num_changes == NUM_LAYERS + 2  # one layer was packed, and brought back
            await made.look(QUIET_S)
            assert made.packing.is_whole

    run_clean(run())


def test_a_gradient_that_is_given_up_leaves_weights_that_are_packed_again() -> None:
    async def run() -> None:
        async with bench() as made:
            made.gate.shut()
            gradient = asyncio.create_task(made.want())
            await made.gate.reached()
            gradient.cancel()
            await asyncio.wait([gradient])
            made.gate.open()
            with pytest.raises(DeadlineExceededError):
                async with made.weights.unpacked(deadline_s=0.0):
                    pass
            assert await made.engine.call(lambda: made.packing.is_mixed)
            await made.look(QUIET_S)
            assert made.packing.is_whole

    run_clean(run())


def test_without_memory_it_is_tried_again_later() -> None:
    async def run() -> None:
        async with bench() as made:
            made.gate.error = MemoryError()
            with pytest.raises(OverloadedError):
                await made.want()
            await made.want()
            made.gate.error = MemoryError()
            await made.look(QUIET_S)
            assert made.packing.is_plain
            await made.look(QUIET_S)
            assert made.packing.is_whole

    run_clean(run())


def test_nothing_is_packed_when_the_server_stops() -> None:
    async def run() -> None:
        async with bench() as made:
            await made.want()
            made.gate.shut()
            made.weights.look(time.monotonic() + QUIET_S)
            await made.gate.reached()
            await made.weights.close()
            made.gate.open()
            await made.look(QUIET_S)
            assert await made.engine.call(lambda: made.packing.is_mixed)

    run_clean(run())


async def request(
    client: Client, kind: type[Forward] | type[Backward], tensors: list[Tensor], **changes: Any
) -> list[Tensor]:
    """A forward or backward of all blocks on two rows of three tokens; what it gives."""
    encoded = [encode(tensor) for tensor in tensors]
    model = client.server.model
    body = kind(
        fingerprint=model.fingerprint,
        start=model.span.start,
        end=model.span.end,
        row_tokens=(3, 3),
        tensors=tuple(spec.to_wire() for spec, _ in encoded),
        deadline_ms=100_000,
    )
    message: Message = await call(
        client.connection,
        replace(body, **changes),
        [buffer for _, buffers in encoded for buffer in buffers],
        reply=ForwardResult if kind is Forward else BackwardResult,
        timeout_s=100.0,
    )
    assert isinstance(message.body, (ForwardResult, BackwardResult))
    (description,) = message.body.tensors
    return [decode(TensorSpec.from_wire(description), message.received_payload)]


def test_steps_and_gradients_of_a_server_are_the_same_before_and_after(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", num_blocks=2, hidden_size=512)
    hidden, gradient = (random_states(1, 6, seed, 512)[0] for seed in range(2))
    prompt = random_states(1, 20, 2, 512)[0]

    async def steps(client: Client) -> Tensor:
        """A prompt, and tokens behind it, of a session of its own."""
        session = await client.open()
        outputs = [await session.step([rows]) for rows in (prompt, *prompt[:4].split(1))]
        session.stream.cancel()
        await until(lambda: client.server.num_sessions == 0)  # or the next one gets other pages, and rounds otherwise
        return torch.cat([rows[0] for rows in outputs])

    async def gradients(client: Client) -> list[Tensor]:
        """Of what brings its inputs, and of a kept graph."""
        found = await request(client, Backward, [gradient, hidden])
        await request(client, Forward, [hidden], graph_id=b"g" * 16)
        return found + await request(client, Backward, [gradient], graph_id=b"g" * 16)

    async def run() -> None:
        async with served(checkpoint) as client:
            training, packing = client.server.holding.handler.training, packing_of(client.server.model.span)
            assert (packing is not None) == linear.is_faster()
            first_steps, found = await steps(client), []
            for _ in range(2):
                found.append(await gradients(client))
                assert packing is None or packing.is_plain
                torch.testing.assert_close(await steps(client), first_steps, rtol=1e-4, atol=1e-4)
                training.weights.look(time.monotonic() + QUIET_S)
                await training.weights.settle()
                assert packing is None or packing.is_whole
                assert torch.equal(await steps(client), first_steps)
            assert all(map(torch.equal, *found))

    run_clean(run())
