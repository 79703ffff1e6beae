"""The engine of a server in this process, without handlers and network: what a packed batch takes by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from petals_core.tensors.codec import encode
from petals_server.config import ServerConfig, ServerLimits
from petals_server.engine import Engine
from petals_server.execution.session import SessionState
from petals_server.execution.states import PackedStates
from petals_server.execution.steps import StepRunner, StepWork
from petals_server.loading import ServedModel, load_model, open_model
from petals_server.scheduling.pace import Pace


class LocalEngine:
    """Sessions of one row each, stepped together."""

    def __init__(self, engine: Engine, model: ServedModel) -> None:
        self._engine = engine
        self._model = model
        assert model.cache is not None
        self._runner = StepRunner(model.span, model.cache, first_layer=0, form=model.form, threads=model.threads)

    def open(self, count: int, max_length: int) -> list[SessionState]:
        """So many sessions."""
        model = self._model
        return [SessionState(model.span, model.pages, num_rows=1, max_length=max_length) for _ in range(count)]

    def close(self, sessions: list[SessionState]) -> None:
        for session in sessions:
            self._engine.close_session(session, session.close)

    async def step(self, session: SessionState, states: torch.Tensor, *, keep: int) -> None:
        """One step of one session; several that are awaited together share a turn."""
        spec, (payload, *_) = encode(states)
        packed = PackedStates(spec=spec, payload=memoryview(payload), row_tokens=(len(states),), position_runs=None)
        work = StepWork(
            session,
            self._runner,
            packed,
            keep=keep,
            row_order=None,
            deadline_s=time.monotonic() + 600,
            max_turn_tokens=self._model.max_turn_tokens,
        )
        await self._engine.compute(work)

    async def step_rate(self, sessions: list[SessionState], token: torch.Tensor, *, prompt: int, count: int) -> float:
        """Tokens per second of packed batches of one token of each session."""
        started_s = time.perf_counter()
        for number in range(count):
            await asyncio.gather(*(self.step(session, token, keep=prompt + number) for session in sessions))
        return len(sessions) * count / (time.perf_counter() - started_s)


@asynccontextmanager
async def engine_of(folder: Path, *, torch_dtype: str, cache_tokens: int) -> AsyncIterator[LocalEngine]:
    """An engine with all blocks of a checkpoint."""
    config = ServerConfig(model=str(folder), torch_dtype=torch_dtype, cache_tokens=cache_tokens)
    engine = Engine(ServerLimits())
    try:
        opened = await engine.call(lambda: open_model(config))
        model = await engine.call(lambda: load_model(opened, 0, opened.num_blocks, config))
        engine.adopt(
            model.pages,
            Pace(
                decode_tokens_per_s=model.threads.decode_tokens_per_s,
                bulk_tokens_per_s=model.threads.bulk_tokens_per_s,
                max_turn_tokens=model.max_turn_tokens,
            ),
        )
        yield LocalEngine(engine, model)
    finally:
        await engine.close()
