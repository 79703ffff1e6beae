"""The blocks that a server holds: loaded, answered for, and given up for others."""

from __future__ import annotations

import asyncio
import logging
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from petals_core.addresses import Address
from petals_core.errors import DrainingError, NotEnoughMemoryError, OverloadedError
from petals_core.net.dialer import Dialer
from petals_core.net.stream import Stream
from petals_server.comfort.ledger import ServedLedger
from petals_server.config import ServerConfig
from petals_server.contribution.desk import ContributionDesk
from petals_server.engine import Engine, is_out_of_memory
from petals_server.speed import Speed, Speedometer

if TYPE_CHECKING:
    from petals_core.models.hashes import ProgressCallback
    from petals_server.handlers import RequestHandler
    from petals_server.loading import OpenedModel, ServedModel

log = logging.getLogger(__name__)

VERSION: Final = version("petals-server")
_LOADING_RETRY_S: Final = 1.0
_PAUSE_GRACE_S: Final = 5.0


class Holding:
    """Blocks of one model, the engine that computes them, and the streams that ask for it. Belongs to one event loop.

    What takes long (imports of torch, loading, computing) happens in the thread that owns the device.
    """

    def __init__(self, config: ServerConfig, *, dialer: Dialer, ledger: ServedLedger, desk: ContributionDesk) -> None:
        self.engine = Engine(config.limits, weight=desk.weight)
        """Another one for each span."""
        self.opened: OpenedModel
        """The model whose blocks these are, after :meth:`open`."""
        self.requests: RequestHandler | None = None
        """What answers; None while blocks are loaded."""
        self.span = (0, 0)
        """The blocks that are held, or being loaded: first, and one past the last."""
        self.load_s = 0.0
        """How long they took to load, downloading and measuring included."""
        self.is_moving = False
        """Whether they are given up for others that are not loaded yet."""
        self._config = config
        self._dialer = dialer
        self._ledger = ledger
        self._desk = desk
        self._is_local = True
        self._is_paused = False
        self._speedometer: Speedometer
        self._streams: set[asyncio.Task[None]] = set()
        """Handlers of streams."""

    @property
    def handler(self) -> RequestHandler:
        """What answers, once blocks are loaded."""
        assert self.requests is not None, "no blocks are loaded"
        return self.requests

    @property
    def is_online(self) -> bool:
        """Whether it takes work."""
        return self.requests is not None and self.requests.state == "online"

    async def open(self, address: Address, progress: ProgressCallback | None) -> None:
        """Find the model, and what this machine can do with it. ``address`` is where others reach the server.

        Raises:
            ConfigurationError: something in the configuration can't work; its subclasses tell model, device, memory.
        """
        self._is_local = address.ip is None or not address.ip.is_global
        self.opened = await self.engine.call(lambda: _open_model(self._config, progress))

    async def load(self, start: int, end: int) -> None:
        """Load blocks and be ready to answer; the engine has no model yet.

        Raises:
            ConfigurationError: as in :meth:`open`.
        """
        self.span = (start, end)
        opened, config = self.opened, self._config
        started_s = asyncio.get_running_loop().time()
        log.info("loading blocks %d:%d of %d", start, end, opened.num_blocks)
        model = await self.engine.call(lambda: _load_model(opened, start, end, config))
        from petals_server.assembly import assemble_handler, measured_speed
        from petals_server.handlers import ServerFacts

        self._speedometer = Speedometer(measured_speed(model), now_s=time.monotonic())
        self.requests = assemble_handler(
            model,
            config=config,
            engine=self.engine,
            dialer=self._dialer,
            facts=ServerFacts(version=VERSION, public_name=config.public_name),
            ledger=self._ledger,
            desk=self._desk,
            is_local=self._is_local,
        )
        if self._is_paused:
            self.requests.state = "draining"
        self.load_s = asyncio.get_running_loop().time() - started_s

    async def close(self) -> None:
        """Free the device. Idempotent."""
        if self.requests is not None:
            await self.requests.training.close()
        await self.engine.close()

    # --- giving up ----------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no new work."""
        self.handler.state = "draining"
        self.handler.training.sessions.close()

    def leave(self) -> None:
        """Take no new work, because other blocks are going to be held: those who come are told so."""
        self.drain()
        self.is_moving = True

    async def replace(self, start: int, end: int) -> None:
        """Unload the blocks and load others. After an error it may be tried again, with these or others.

        Raises:
            ConfigurationError: as in :meth:`open`.
        """
        requests, self.requests = self.requests, None
        self.span = (start, end)
        if requests is not None:
            await requests.training.close()
        await self.engine.close()
        self.engine = Engine(self._config.limits, weight=self._desk.weight)
        await self.load(start, end)
        self.is_moving = False

    async def pause(self) -> None:
        """Take no work, and let what is open end soon, until ``resume``; the blocks stay loaded."""
        self._is_paused = True
        if self.requests is not None and not self.is_moving:
            self.requests.state = "draining"
            await self.end_streams(_PAUSE_GRACE_S)

    def resume(self) -> None:
        """Take work again."""
        self._is_paused = False
        if self.requests is not None and not self.is_moving:
            self.requests.state = "online"

    async def end_streams(self, grace_s: float) -> None:
        """Let what is open end; then the rest is told to go elsewhere."""
        if self._streams:
            await asyncio.wait(self._streams, timeout=grace_s)
        for task in self._streams:
            task.cancel()
        if self._streams:
            await asyncio.wait(self._streams)

    # --- serving ------------------------------------------------------------------------------------------------------

    async def serve(self, stream: Stream) -> None:
        """Answer what comes on a stream, until it ends.

        Raises:
            DrainingError: the blocks are given up for others.
            OverloadedError: they are still being loaded.
        """
        requests = self.requests
        if self.is_moving and (requests is None or requests.state != "online"):
            raise DrainingError("the server is moving to other blocks")
        if requests is None:
            raise OverloadedError("the server is still loading its blocks", retry_after_s=_LOADING_RETRY_S)
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            await requests(stream)
        finally:
            self._streams.discard(task)

    def observe_speed(self) -> Speed:
        """How fast it is, as measured at first and observed since."""
        pace = self.engine.pace
        observed = Speed(decode_tokens_per_s=pace.decode_tokens_per_s, forward_tokens_per_s=pace.bulk_tokens_per_s)
        return self._speedometer.observe(observed, now_s=time.monotonic())


# Importing torch and Transformers takes seconds, so it happens in the device's thread, inside of these two.


def _open_model(config: ServerConfig, progress: ProgressCallback | None) -> OpenedModel:
    from petals_server.loading import open_model

    return open_model(config, progress)


def _load_model(opened: OpenedModel, start: int, end: int, config: ServerConfig) -> ServedModel:
    from petals_server.loading import load_model

    try:
        return load_model(opened, start, end, config)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError(
            f"there is not enough memory on {opened.device} for blocks {start}:{end} and what computing them takes: "
            "serve fewer with --num-blocks, lower --attn-cache-tokens, or free memory"
        ) from error
