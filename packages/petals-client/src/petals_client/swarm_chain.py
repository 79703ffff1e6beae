"""The chain of servers behind a model's blocks, callable from any thread."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from petals_client.adaptation import Adaptation
from petals_client.chain import StepRequest
from petals_client.chunks import split_columns
from petals_client.loop_thread import LoopThread, inherit
from petals_client.options import ClientOptions
from petals_client.packing import PositionRuns
from petals_client.part_states import decode_states, encode_states, join_parts, take_part
from petals_client.routing.explanation import Route
from petals_client.swarm import Swarm
from petals_client.swarm_session import SwarmSession
from petals_client.trace import StepTrace
from petals_client.training import TrainingRun, TrainingTrace
from petals_client.window import choose_join_tokens, choose_part_sizes
from petals_core.errors import InvalidRequestError, SessionLengthError
from petals_core.limits import MAX_BATCH_ROWS, MAX_SESSION_TOKENS
from petals_core.models.architecture import block_count
from petals_core.models.checkpoint import Checkpoint, resolve_dtype
from petals_core.models.transformers_quantization import stored_quantization
from petals_core.routing.graph import Chain

T = TypeVar("T")


class SwarmChain:
    """A ``petals_client.chain.Chain`` of the servers of one checkpoint.

    Any thread may use it, also while an event loop of the caller's runs in that thread. A forked child makes a loop and
    connections of its own when it first uses it; sessions do not go over into the child.
    """

    def __init__(
        self,
        options: ClientOptions,
        *,
        model_name: str,
        fingerprint: str,
        num_blocks: int,
        torch_dtype: str,
        quantization: str | None = None,
    ) -> None:
        self.options = options
        self.num_blocks = num_blocks
        self._make_swarm = lambda: Swarm(
            options,
            model_name=model_name,
            fingerprint=fingerprint,
            num_blocks=num_blocks,
            torch_dtype=torch_dtype,
            quantization=quantization,
        )
        self._swarm: Swarm | None = None
        self._thread = LoopThread(forget=_Forget(self))
        self._finalizer = weakref.finalize(self, self._thread.close)

    @classmethod
    def connect(
        cls, checkpoint: Checkpoint, options: ClientOptions, *, dtype: torch.dtype | str = "auto"
    ) -> SwarmChain:
        """Join the swarm and look up the servers of a checkpoint; that there are none yet is no error.

        ``dtype`` is what the client computes in (``auto``: the checkpoint's own); servers that compute in another one
        are warned of.

        Raises:
            ConfigurationError: ``dtype`` is none that can be computed in.
            NoPeersError: none of the initial peers answers.
        """
        chain = cls(
            options,
            model_name=checkpoint.name,
            fingerprint=checkpoint.fingerprint,
            num_blocks=block_count(checkpoint.config),
            torch_dtype=str(resolve_dtype(dtype, checkpoint)).removeprefix("torch."),
            quantization=stored_quantization(checkpoint.config),
        )
        try:
            chain._thread.run(chain._refresh())
        except BaseException:
            chain.close()
            raise
        return chain

    # --- Chain --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden: Tensor,
        *,
        start: int,
        end: int,
        row_tokens: tuple[int, ...],
        position_runs: PositionRuns | None,
    ) -> Tensor:
        """See ``Chain.forward``. Parts of a large batch are under way at once."""
        return self.forward_for_training(
            hidden, None, start=start, end=end, row_tokens=row_tokens, position_runs=position_runs, keeps_graphs=False
        )[0]

    def forward_for_training(
        self,
        hidden: Tensor,
        prompts: Tensor | None,
        *,
        start: int,
        end: int,
        row_tokens: tuple[int, ...],
        position_runs: PositionRuns | None,
        keeps_graphs: bool,
        adaptation: Adaptation | None = None,
    ) -> tuple[Tensor, TrainingTrace, list[Tensor]]:
        """See ``Chain.forward_for_training``. Parts of a batch are under way at once."""

        async def run(swarm: Swarm) -> tuple[Tensor, TrainingTrace, list[Tensor]]:
            return await TrainingRun(swarm, keeps_graphs=keeps_graphs, adaptation=adaptation).forward(
                hidden, prompts, start=start, end=end, row_tokens=row_tokens, position_runs=position_runs
            )

        return self.run(run)

    def backward(
        self, trace: Any, inputs: Sequence[Tensor], prompts: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See ``Chain.backward``."""

        async def run(swarm: Swarm) -> tuple[Tensor, Tensor | None, Tensor | None]:
            return await TrainingRun(swarm, keeps_graphs=True, adaptation=trace.adaptation).backward(
                trace, inputs, prompts, gradient
            )

        return self.run(run)

    def open_session(
        self,
        *,
        start: int,
        end: int,
        num_rows: int,
        max_length: int,
        prompts: Tensor | None = None,
        adaptation: Adaptation | None = None,
    ) -> SwarmChainSession:
        """See ``Chain.open_session``."""
        _check_session(num_rows, max_length)

        async def run() -> SwarmSession:
            swarm = await self._ensure_swarm()
            session = SwarmSession(
                swarm,
                start=start,
                end=end,
                num_rows=num_rows,
                max_length=max_length,
                prompts=prompts,
                adaptation=adaptation,
            )
            await session.open()
            return session

        return SwarmChainSession(self._thread, self._thread.run(run()), self.options)

    def explain_route(self, start: int, end: int) -> Route:
        """See ``Chain.explain_route``."""
        return self.run(lambda swarm: swarm.explain_route(start, end))

    def close(self) -> None:
        """Close all connections and end the thread; idempotent."""
        swarm, self._swarm = self._swarm, None
        if swarm is not None:
            try:
                self._thread.run(swarm.close())
            finally:
                self._thread.close()
        else:
            self._thread.close()

    # --- for status ---------------------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        swarm = await self._ensure_swarm()
        await swarm.directory.refresh()

    def check_adapter(self, name: str) -> None:
        """See that servers have an adapter for all blocks.

        Raises:
            MissingAdapterError: they do not; the text says which servers have which.
        """

        async def check(swarm: Swarm) -> None:
            await swarm.plan(0, self.num_blocks, adapter=name)

        self.run(check)

    async def _ensure_swarm(self) -> Swarm:
        if self._swarm is None:
            self._swarm = self._make_swarm()
        return self._swarm

    def run(self, use: Callable[[Swarm], Coroutine[Any, Any, T]]) -> T:
        """Run something on the swarm in its loop."""

        async def run() -> T:
            return await use(await self._ensure_swarm())

        return self._thread.run(run())

    def __deepcopy__(self, memo: object) -> SwarmChain:
        return self

    def _forget(self) -> None:
        inherit(self._swarm)
        self._swarm = None


class _Forget:
    """Calls ``SwarmChain._forget`` without keeping the chain alive."""

    def __init__(self, chain: SwarmChain) -> None:
        self._chain = weakref.ref(chain)

    def __call__(self) -> None:
        chain = self._chain()
        if chain is not None:
            chain._forget()


class SwarmChainSession:
    """A ``petals_client.chain.ChainSession`` with the servers of a chain."""

    def __init__(self, thread: LoopThread, session: SwarmSession, options: ClientOptions) -> None:
        self._thread = thread
        self._session = session
        self._options = options
        self._process_id = os.getpid()

    @property
    def chain(self) -> Chain:
        """The servers that serve it."""
        return self._session.chain

    def step(self, hidden: Tensor, request: StepRequest, *, num_wanted: int | None = None) -> Tensor:
        """See ``ChainSession.step``. Parts of a long prompt follow each other through the chain."""
        if os.getpid() != self._process_id:
            raise InvalidRequestError(
                "this session was opened before this process was forked, and stays with the parent: "
                "open another one here with model.inference_session()"
            )
        rate = self._session.rate_bytes_per_s
        sizes = [1] if hidden.shape[0] == 1 else self._choose_sizes(hidden, rate)
        if num_wanted is not None and num_wanted < max(request.row_tokens):
            request = replace(request, wanted=num_wanted)
        elif len(sizes) == 1:
            states = encode_states(hidden, self._options, rate)
            step, session = [(request, states)], self._session
            return decode_states(self._thread.call(lambda caller: session.begin_step(step, caller))[0])
        if len(sizes) > 1 and self._options.part_tokens is None:
            most = choose_join_tokens(hidden.shape[0], len(self._session.chain))
            request = replace(request, join_tokens=min(self._options.max_tokens_per_request, most))
        parts = split_columns(request, *sizes)
        inputs = [(step, encode_states(take_part(hidden, part), self._options, rate)) for step, part in parts]
        return join_parts(hidden, parts, self._thread.run(self._session.step(inputs)))

    def _choose_sizes(self, hidden: Tensor, rate: float | None) -> list[int]:
        return choose_part_sizes(
            hidden.shape[0],
            len(self._session.chain),
            max_tokens=self._options.max_tokens_per_request,
            part_tokens=self._options.part_tokens,
            token_bytes=hidden.shape[1] * hidden.element_size(),
            link_bytes_per_s=rate,
            round_trip_s=self._session.round_trip_s,
        )

    def trace(self) -> tuple[StepTrace, ...]:
        """See ``ChainSession.trace``."""

        async def write() -> None:
            self._session.settle()

        with contextlib.suppress(InvalidRequestError):  # closed, so all was noted
            self._thread.run(write())
        return tuple(self._session.notes.traces)

    def close(self) -> None:
        """See ``ChainSession.close``."""
        self._thread.start_soon(self._session.close)


def _check_session(num_rows: int, max_length: int) -> None:
    """What no server can open: a server that says so would be taken for one that is at fault."""
    if num_rows > MAX_BATCH_ROWS:
        raise InvalidRequestError(f"a session has at most {MAX_BATCH_ROWS:,} rows, not {num_rows:,}: split the batch")
    if max_length > MAX_SESSION_TOKENS:
        raise SessionLengthError(
            f"a session holds at most {MAX_SESSION_TOKENS:,} tokens a row, not {max_length:,}: ask for a shorter one"
        )
