"""What a terminal or a log shows while weights are read."""

from __future__ import annotations

import logging
import time
from typing import Final

from petals_core.terminal import stderr_console

log = logging.getLogger(__name__)


class LoadingDisplay:
    """Progress of reading weights: a bar on a terminal, a line every now and then elsewhere."""

    _LINE_INTERVAL_S: Final = 15.0

    def __init__(self) -> None:
        self._last_line_s: float | None = None
        console = stderr_console()
        self._progress = None
        if console.is_terminal:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task("opening", total=None)

    def __enter__(self) -> LoadingDisplay:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away and give the cursor back."""
        if self._progress is not None:
            self._progress.stop()

    def report(self, what: str, num_bytes_done: int, num_bytes: int) -> None:
        """Called in the device's thread."""
        if self._progress is not None:
            self._progress.update(self._task, description=what.split()[0], completed=num_bytes_done, total=num_bytes)
            return
        now_s = time.monotonic()
        if self._last_line_s is None:
            self._last_line_s = now_s
        elif now_s - self._last_line_s >= self._LINE_INTERVAL_S:
            self._last_line_s = now_s
            log.info("%s: %d of %d MiB", what.split()[0], num_bytes_done >> 20, num_bytes >> 20)
