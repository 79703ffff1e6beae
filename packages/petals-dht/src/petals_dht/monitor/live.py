"""A monitor on a terminal: draws what is observed, and listens to keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from petals_core.errors import ConfigurationError
from petals_dht.monitor.controls import Controls, press
from petals_dht.monitor.figures import ASCII, UNICODE
from petals_dht.monitor.keys import KeyReader
from petals_dht.monitor.screen import (
    MIN_HEIGHT,
    MIN_WIDTH,
    Canvas,
    draw,
    draw_once,
    is_too_small,
    model_of,
    page_size,
    rows_of,
)
from petals_dht.monitor.view import SwarmView, view_swarm
from petals_dht.monitor.watcher import Watcher
from petals_dht.signals import stop_signals

try:
    import termios
    import tty
except ImportError:  # Windows: no keys but Ctrl-C.
    termios = None  # type: ignore[assignment]

_MIN_FRAME_S = 0.03
_PROBE_PAUSE_S = 1.0
_MANY_SERVERS = 500
"""A model with more of them is looked up more seldom in proportion, so that the work stays bounded."""


def view_now(watcher: Watcher) -> SwarmView:
    """What has been observed, as of now."""
    return view_swarm(watcher.observations, at_s=time.monotonic(), now_s=time.time())


def canvas_of(console: Console, *, height: int | None) -> Canvas:
    """What a console can show."""
    is_unicode = (console.encoding or "").lower().startswith("utf")
    return Canvas(width=console.width, height=height, glyphs=UNICODE if is_unicode else ASCII)


def print_once(view: SwarmView, console: Console) -> None:
    """Print the view and be done."""
    for line in draw_once(view, canvas_of(console, height=None), clock=_clock_text()):
        console.print(line, no_wrap=True, overflow="crop", soft_wrap=False)


def check_size(console: Console) -> None:
    """See that there is room.

    Raises:
        ConfigurationError: there is too little.
    """
    width, height = console.size
    if is_too_small(width, height):
        raise ConfigurationError(
            f"the terminal has room for {width} x {height} characters and the monitor takes at least "
            f"{MIN_WIDTH} x {MIN_HEIGHT}: enlarge it, or print the view with --once"
        )


async def run_live(watcher: Watcher, console: Console, *, refresh_s: float) -> None:
    """Watch until the user quits or the process is told to end. The terminal is left as it was."""
    changed = asyncio.Event()
    state = _State(watcher, console, changed)
    with (
        stop_signals() as stopped,
        _resizes(changed.set),
        _keys(state.take_key),
        Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live,
    ):
        watching = asyncio.create_task(_watch(state, refresh_s))
        stopping = asyncio.create_task(stopped.wait())
        try:
            while not state.controls.is_over and not stopped.is_set() and not watching.done():
                live.update(state.picture(), refresh=True)
                waking = asyncio.create_task(changed.wait())
                await asyncio.wait({waking, stopping, watching}, return_when=asyncio.FIRST_COMPLETED)
                waking.cancel()
                # Keys that come together, as when one is held down, are drawn together.
                await asyncio.sleep(_MIN_FRAME_S)
                changed.clear()
        finally:
            stopping.cancel()
            watching.cancel()
            outcome, _ = await asyncio.gather(watching, stopping, return_exceptions=True)
    if isinstance(outcome, Exception):
        raise outcome


class _State:
    """What is drawn next."""

    def __init__(self, watcher: Watcher, console: Console, changed: asyncio.Event) -> None:
        self.watcher = watcher
        self.controls = Controls()
        self.changed = changed
        self.clock = _clock_text()
        self._console = console
        self.view = view_now(watcher)

    def refresh(self) -> None:
        """Take over what was observed."""
        self.view = view_now(self.watcher)
        self.clock = _clock_text()
        self.changed.set()

    def take_key(self, key: str) -> None:
        rows = [server.peer_id for server in rows_of(self.view, self.controls)]
        page = page_size(self.view, self.controls, self._canvas())
        self.controls = press(self.controls, key, rows=rows, num_models=len(self.view.models), page=page)
        self.changed.set()

    def picture(self) -> Text:
        lines = draw(self.view, self.controls, self._canvas(), clock=self.clock)
        text = Text("\n", no_wrap=True, overflow="crop", end="").join(lines)
        text.no_wrap, text.overflow = True, "crop"
        return text

    def _canvas(self) -> Canvas:
        return canvas_of(self._console, height=self._console.height)


async def _watch(state: _State, refresh_s: float) -> None:
    """Look up and probe for ever. A server that takes long to answer does not hold up the look-ups."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_probe_regularly(state))
        tasks.create_task(_look_regularly(state, refresh_s))


async def _look_regularly(state: _State, refresh_s: float) -> None:
    while True:
        # The first look-up was made before the screen was taken.
        num_servers = max((len(each.servers) for each in state.watcher.observations.overviews()), default=0)
        await asyncio.sleep(refresh_s * max(1.0, num_servers / _MANY_SERVERS))
        model = model_of(state.view, state.controls)
        await state.watcher.look(None if model is None else model.model)
        state.refresh()


async def _probe_regularly(state: _State) -> None:
    while True:
        if await state.watcher.probe():
            state.refresh()
        await asyncio.sleep(_PROBE_PAUSE_S)


def _clock_text() -> str:
    return time.strftime("%H:%M:%S")


@contextlib.contextmanager
def _resizes(tell: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` when the terminal changes its size."""
    number = getattr(signal, "SIGWINCH", None)
    loop = asyncio.get_running_loop()
    if number is None:
        yield
        return
    loop.add_signal_handler(number, tell)
    try:
        yield
    finally:
        loop.remove_signal_handler(number)


@contextlib.contextmanager
def _keys(take: Callable[[str], None]) -> Iterator[None]:
    """Call ``take`` for each key, if stdin is a terminal that can tell them; the terminal is put back afterwards."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    descriptor, loop, reader = sys.stdin.fileno(), asyncio.get_running_loop(), KeyReader()
    before = termios.tcgetattr(descriptor)

    def read() -> None:
        content = os.read(descriptor, 1024)
        for key in reader.feed(content) if content else ["interrupt"]:
            take(key)

    tty.setcbreak(descriptor, termios.TCSANOW)
    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
