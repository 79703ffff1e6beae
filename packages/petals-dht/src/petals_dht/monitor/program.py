"""The ``monitor`` command: joins, looks, and shows in the way that was asked for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

from rich.console import Console

from petals_core.addresses import Address
from petals_core.errors import PetalsError
from petals_core.swarm_key import SwarmKey
from petals_dht.directory import Directory
from petals_dht.monitor.exports import to_json, to_prometheus
from petals_dht.monitor.live import check_size, print_once, run_live, view_now
from petals_dht.monitor.observations import Observations
from petals_dht.monitor.watcher import Watcher


class Output(Enum):
    """How a swarm is shown."""

    LIVE = auto()
    ONCE = auto()
    JSON = auto()
    PROMETHEUS = auto()


async def run_monitor(
    peers: Sequence[Address],
    swarm_key: SwarmKey | None,
    wanted: str | None,
    *,
    output: Output,
    refresh_s: float,
    timeout_s: float,
    explain_nothing: Callable[[str | None, float | None], PetalsError],
) -> None:
    """Show a swarm. Where stdout is no terminal that can be drawn on, ``LIVE`` prints once.

    Raises:
        ConfigurationError: there are no initial peers, or the terminal is too small.
        NoPeersError: no node of the swarm answers.
        PetalsError: what ``explain_nothing`` makes of a swarm without (such) servers.
    """
    console = Console(highlight=False)
    if output is Output.LIVE and (not console.is_terminal or console.is_dumb_terminal):
        output = Output.ONCE
    if output is Output.LIVE:
        check_size(console)
    async with (
        await Directory.connect(peers, swarm_key=swarm_key, timeout_s=timeout_s) as directory,
        Watcher(
            directory,
            Observations(opened_at_s=time.monotonic()),
            swarm_key=swarm_key,
            wanted=wanted,
            timeout_s=timeout_s,
        ) as watcher,
    ):
        await watcher.look_at_all()
        clock_offset_s = directory.suspected_clock_offset_s()
        is_empty = not watcher.observations.overviews()
        # An empty swarm is worth watching; one that can't be seen, or a model that nobody knows, is not.
        if is_empty and (output is not Output.LIVE or wanted is not None or clock_offset_s is not None):
            raise explain_nothing(wanted, clock_offset_s)
        if output is Output.LIVE:
            await run_live(watcher, console, refresh_s=refresh_s)
            return
        await watcher.probe()
        view = view_now(watcher)
        match output:
            case Output.JSON:
                sys.stdout.write(json.dumps(to_json(view), indent=2) + "\n")
            case Output.PROMETHEUS:
                sys.stdout.write(to_prometheus(view))
            case _:
                print_once(view, console)
