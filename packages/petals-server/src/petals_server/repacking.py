"""Brings weights into torch's order when somebody wants a gradient, and packs them again when nobody has for a while.

Both happen layer by layer, each in a turn of its own that goes behind everybody's steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import final

from petals_core.errors import DrainingError, PetalsError
from petals_server.engine import Engine
from petals_server.execution.packing import Packing
from petals_server.graphs import GraphStore
from petals_server.quiet_time import QUIET_S, QuietTime
from petals_server.scheduling.request import Urgency
from petals_server.threads import ThreadPlan
from petals_server.work import Work

log = logging.getLogger(__name__)


@final
class LayerByLayer(Work[None]):
    """Changes one layer in each turn, for as long as there is another one."""

    def __init__(self, change_next: Callable[[], bool], threads: ThreadPlan, *, deadline_s: float | None) -> None:
        """``change_next`` returns whether to go on."""
        super().__init__(urgency=Urgency.TRAINING, num_tokens=0, deadline_s=deadline_s)
        self._change_next = change_next
        self._threads = threads

    def advance(self, num_tokens: int) -> bool:
        self._threads.apply(self.urgency)
        return not self._change_next()

    def result(self) -> None:
        """Nothing: the layers are changed."""


class Repacking:
    """Keeps a span's weights in the form that is wanted. Belongs to one event loop."""

    def __init__(self, packing: Packing | None, threads: ThreadPlan, *, engine: Engine, graphs: GraphStore) -> None:
        """``packing`` None: weights have one form only. ``graphs``: they hold weights in torch's order."""
        self._packing = packing
        self._threads = threads
        self._engine = engine
        self._graphs = graphs
        self._quiet = QuietTime()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def unpacked(self, *, deadline_s: float) -> AsyncIterator[None]:
        """Weights in torch's order, for as long as the context lasts.

        Raises:
            DeadlineExceededError: that took too long.
            PetalsError: as ``Engine.compute``.
        """
        packing = self._packing
        if packing is None:
            yield
            return
        self._quiet.begin()
        try:
            if not packing.is_plain or self._task is not None:  # the first layer may be changing right now
                await self._engine.compute(LayerByLayer(packing.unpack_next, self._threads, deadline_s=deadline_s))
            yield
        finally:
            now_s = time.monotonic()
            self._quiet.end(now_s)
            self.look(now_s)

    def look(self, now_s: float) -> None:
        """Pack the weights if it is time, or find out when it is. To be called when graphs are gone."""
        packing = self._packing
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if packing is None or packing.is_whole or self._task is not None or self._is_closed:
            return
        left_s = self._quiet.left_s(now_s, num_graphs=len(self._graphs))
        if left_s == 0:
            self._task = asyncio.get_running_loop().create_task(self._pack(packing))
        elif left_s is not None:
            self._look_in(left_s)

    def _look_in(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, lambda: self.look(time.monotonic()))

    async def _pack(self, packing: Packing) -> None:
        """Pack layer by layer until all are, or somebody wants a gradient."""

        def pack_next() -> bool:
            return not (self._quiet.is_wanted or self._is_closed) and packing.pack_next()

        try:
            await self._engine.compute(LayerByLayer(pack_next, self._threads, deadline_s=None))
        except DrainingError:
            return
        except PetalsError as error:
            log.warning("weights could not be packed, trying again in %.0f s: %s", QUIET_S, error)
        finally:
            self._task = None
        if not (packing.is_whole or self._is_closed):
            self._look_in(QUIET_S)

    async def settle(self) -> None:
        """Wait until weights that are being packed are, or somebody wants a gradient."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Change nothing any more, but what a gradient needs. Idempotent."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await self.settle()
