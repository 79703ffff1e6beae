"""Training requests and tuning sessions that do not fit are refused in one line, and hurt nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petals_core.errors import (
    DeadlineExceededError,
    DrainingError,
    GraphExpiredError,
    InvalidRequestError,
    MissingAdapterError,
    OverloadedError,
    PetalsError,
    TuningExpiredError,
)
from petals_core.net.rpc import call
from petals_core.net.stream import Stream
from petals_core.tensors.codec import encode
from petals_core.testing.network import run_clean
from petals_core.wire.frames import Priority
from petals_core.wire.messages import (
    Backward,
    BackwardResult,
    Forward,
    ForwardResult,
    Message,
    OpenTuning,
    Step,
    TuningReady,
    UpdateTuning,
)
from petals_server.config import ServerLimits
from petals_server.testing import Client, connected, random_states, served, until

HIDDEN = random_states(1, 6)[0]
GRADIENT = random_states(1, 6, seed=1)[0]
LAYERS = ("self_attn.q_proj", "self_attn.v_proj")
RANK = 2
TIMEOUT_S = 30.0
GRAPH = b"g" * 16


def packed(tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], list[Any]]:
    encoded = [encode(tensor) for tensor in tensors]
    return tuple(spec.to_wire() for spec, _ in encoded), [buffer for _, buffers in encoded for buffer in buffers]


async def request(
    client: Client, kind: type[Forward] | type[Backward], tensors: Sequence[Tensor], **changes: Any
) -> Message:
    """A forward or backward of all blocks on two rows of three tokens."""
    specs, payload = packed(tensors)
    model = client.server.model
    body = kind(
        fingerprint=model.fingerprint,
        start=model.span.start,
        end=model.span.end,
        row_tokens=(3, 3),
        tensors=specs,
        deadline_ms=10_000,
    )
    reply = ForwardResult if kind is Forward else BackwardResult
    return await call(client.connection, replace(body, **changes), payload, reply=reply, timeout_s=TIMEOUT_S)


async def assert_trains(client: Client) -> None:
    """Forward, and backward of what was kept."""
    forward = await request(client, Forward, [HIDDEN], graph_id=GRAPH)
    assert isinstance(forward.body, ForwardResult)
    assert forward.body.is_kept
    backward = await request(client, Backward, [GRADIENT], graph_id=GRAPH)
    assert isinstance(backward.body, BackwardResult)
    assert len(backward.body.tensors) == 1


@pytest.mark.parametrize(
    ("kind", "tensors", "changes", "text"),
    [
        (Forward, [HIDDEN, torch.ones(3, 1, 2, 64)], {}, r"\[4, 1 or 2, tokens, 64\]"),
        (Forward, [HIDDEN, torch.ones(4, 3, 2, 64)], {}, r"\[4, 1 or 2, tokens, 64\]"),
        (Forward, [HIDDEN, torch.ones(4, 1, 4, 64)], {}, "4 tokens for a row that has 3"),
        (Forward, [HIDDEN, torch.ones(4, 1, 2, 64), HIDDEN], {}, "3 tensors where"),
        (Forward, [HIDDEN], {"graph_id": GRAPH, "row_tokens": (6, 0)}, "a row without tokens"),
        (Forward, [HIDDEN], {"graph_id": GRAPH, "row_tokens": (3, 4)}, "where row_tokens and the model ask for"),
        (Forward, [HIDDEN.long()], {"graph_id": GRAPH}, "no floating-point numbers"),
        (Backward, [GRADIENT], {}, "1 tensors where gradient, hidden states, prompts"),
        (Backward, [GRADIENT[:5], HIDDEN], {}, "a gradient of shape"),
        (Backward, [GRADIENT, HIDDEN[:, :8]], {}, "hidden states of shape"),
        (Backward, [GRADIENT, HIDDEN], {"position_runs": (((0, 3),), ((0, 2),))}, "one position to each token"),
    ],
)
def test_requests_that_do_not_fit(
    checkpoint: Path,
    kind: type[Forward] | type[Backward],
    tensors: Sequence[Tensor],
    changes: dict[str, Any],
    text: str,
) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            with pytest.raises(InvalidRequestError, match=text):
                await request(client, kind, tensors, **changes)
            await assert_trains(client)

    run_clean(run())


def test_backward_without_forward_and_of_others(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client, connected(client.server) as other:
            with pytest.raises(GraphExpiredError, match="send the inputs along"):
                await request(client, Backward, [GRADIENT], graph_id=GRAPH)
            await request(client, Forward, [HIDDEN], graph_id=GRAPH)
            with pytest.raises(GraphExpiredError):  # names are each peer's own
                await request(other, Backward, [GRADIENT], graph_id=GRAPH)
            with pytest.raises(InvalidRequestError, match="of another forward"):
                await request(client, Backward, [GRADIENT], graph_id=GRAPH, row_tokens=(2, 4))
            graphs = client.server.holding.handler.training.graphs
            assert (len(graphs), graphs.num_bytes) == (0, 0)
            await assert_trains(client)

    run_clean(run())


# --- tuning sessions --------------------------------------------------------------------------------------------------


class Tuning:
    """A tuning session of a client for all blocks."""

    def __init__(self, client: Client) -> None:
        self.stream: Stream = client.connection.open_stream(Priority.BULK)
        self._model = client.server.model

    async def open(self, values: Tensor, values_id: bytes = b"v" * 16, **changes: Any) -> None:
        specs, payload = packed([values])
        body = OpenTuning(
            fingerprint=self._model.fingerprint,
            start=self._model.span.start,
            end=self._model.span.end,
            layers=LAYERS,
            rank=RANK,
            scaling=1.0,
            values_id=values_id,
            tensors=specs,
            deadline_ms=10_000,
        )
        await self.stream.send(replace(body, **changes), payload)
        await self._receive(values_id)

    async def update(self, values: Tensor, values_id: bytes) -> None:
        specs, payload = packed([values])
        await self.stream.send(UpdateTuning(values_id=values_id, tensors=specs, deadline_ms=10_000), payload)
        await self._receive(values_id)

    async def _receive(self, values_id: bytes) -> None:
        body = (await self.stream.receive(timeout_s=TIMEOUT_S)).body
        assert isinstance(body, TuningReady)
        assert body.values_id == values_id


def count_values(client: Client) -> int:
    span = client.server.model.span
    layers = [block.get_submodule(path) for block in span.blocks for path in LAYERS]
    return sum(RANK * (layer.in_features + layer.out_features) for layer in layers)  # type: ignore[operator]


def test_values_are_their_senders_and_last_as_long_as_their_stream(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client, connected(client.server) as other:
            sessions = client.server.holding.handler.training.sessions
            values = torch.randn(count_values(client)) * 0.1
            tuning = Tuning(client)
            await tuning.open(values)
            assert sessions.num_bytes == values.nbytes
            reply = await request(client, Backward, [GRADIENT, HIDDEN], tuning=b"v" * 16)
            assert isinstance(reply.body, BackwardResult)
            assert tuple(reply.body.tensors[1][0]) == (len(values),)
            for peer, name in ((other, b"v" * 16), (client, b"w" * 16)):
                with pytest.raises(TuningExpiredError, match="send them"):
                    await request(peer, Forward, [HIDDEN], tuning=name)
            await tuning.update(values * 2, b"w" * 16)
            await request(client, Forward, [HIDDEN], tuning=b"w" * 16)
            with pytest.raises(TuningExpiredError):
                await request(client, Forward, [HIDDEN], tuning=b"v" * 16)
            tuning.stream.cancel()
            await until(lambda: len(sessions) == 0)
            assert sessions.num_bytes == 0
            with pytest.raises(TuningExpiredError):
                await request(client, Forward, [HIDDEN], tuning=b"w" * 16)
            with pytest.raises(MissingAdapterError, match="it has no adapters"):
                await request(client, Forward, [HIDDEN], active_adapter="poems@00000000")
            await assert_trains(client)

    run_clean(run())


def test_tuning_sessions_do_not_keep_a_server_from_stopping(checkpoint: Path) -> None:
    async def run() -> None:
        async with served(checkpoint) as client:
            tuning = Tuning(client)
            await tuning.open(torch.zeros(count_values(client)))
            stopping = asyncio.create_task(client.server.stop(drain_timeout_s=600.0))
            with pytest.raises(DrainingError, match="about to stop"):
                await tuning.stream.receive(timeout_s=TIMEOUT_S)
            await stopping

    run_clean(run())


@pytest.mark.parametrize(
    ("changes", "size", "error", "text"),
    [
        ({}, -1, InvalidRequestError, "asks for"),
        ({"layers": ("self_attn.q_prog",)}, 0, InvalidRequestError, "none of the layers.*which have mlp.down_proj"),
        ({"layers": LAYERS + LAYERS[:1]}, 0, InvalidRequestError, "names a layer twice"),
        ({"rank": 200}, 0, InvalidRequestError, "over the 20,000 that this server takes"),
        ({"start": 2, "end": 9}, 0, PetalsError, "do not include 2:9"),
    ],
)
def test_tuning_sessions_that_do_not_fit(
    checkpoint: Path, changes: dict[str, Any], size: int, error: type[PetalsError], text: str
) -> None:
    async def run() -> None:
        limits = ServerLimits(max_tuning_session_bytes=20_000)
        async with served(checkpoint, limits=limits) as client:
            with pytest.raises(error, match=text):
                await Tuning(client).open(torch.zeros(count_values(client) + size), **changes)
            sessions = client.server.holding.handler.training.sessions
            assert (len(sessions), sessions.num_bytes) == (0, 0)
            await Tuning(client).open(torch.zeros(count_values(client)))

    run_clean(run())


def test_a_client_has_few_tuning_sessions_and_uses_them(checkpoint: Path) -> None:
    async def run() -> None:
        limits = ServerLimits(max_tuning_sessions_per_peer=1, max_idle_s=0.05)
        async with served(checkpoint, limits=limits) as client, connected(client.server) as other:
            values = torch.zeros(count_values(client))
            first = Tuning(client)
            await first.open(values)
            with pytest.raises(OverloadedError, match="all that this server takes"):
                await Tuning(client).open(values)
            await Tuning(other).open(values)
            with pytest.raises(DeadlineExceededError, match="idle"):
                await first.stream.receive(timeout_s=TIMEOUT_S)
            again = Tuning(client)
            await again.open(values)
            await again.stream.send(Step(step=0, keep=0, row_tokens=(1,), tensors=(), deadline_ms=1000))
            with pytest.raises(InvalidRequestError, match="takes values, not Step"):
                await again.stream.receive(timeout_s=TIMEOUT_S)

    run_clean(run())
