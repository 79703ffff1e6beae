"""What ``tools/soak.py`` does, once the environment is there."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import random
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from local_swarm import LocalSwarm
from nursery import Birth, Nursery
from petals_client import AutoDistributedModelForCausalLM
from petals_core.errors import PetalsError
from petals_core.testing.factories import VOCABULARY, make_checkpoint

SPANS: Final = ((0, 2), (2, 4), (4, 6))
NUM_COPIES: Final = 2
NUM_BLOCKS: Final = SPANS[-1][1]
_GREEDY: Final[dict[str, Any]] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
_PORTS: Final = itertools.cycle(random.sample(range(20_000, 32_768), 32_768 - 20_000))
_PATIENCE_S: Final = 0.05
_STALLS_S: Final = (0.05, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run."""

    seed: int
    num_generations: int = 200
    num_tokens: int = 32
    kill_every_s: float = 2.0
    restart_after_s: float = 3.0
    waits_for_all: bool = False
    """Kill nobody before all servers are up again: for a short test on a busy machine."""


@dataclass(slots=True)
class Outcome:
    """What came of it. Times are in seconds."""

    num_identical: int = 0
    different: list[int] = field(default_factory=list)
    """Numbers of generations whose tokens were not those of the local model."""
    failed: list[str] = field(default_factory=list)
    """Errors that a generation ended with."""
    num_kills: int = 0
    num_restarts: int = 0
    late_s: float = 0.0
    """How far the schedule of kills and restarts was missed at most."""
    up_after_s: list[float] = field(default_factory=list)
    """From the fork of a restarted server to its announcement."""
    num_failovers: int = 0
    token_s: list[float] = field(default_factory=list)
    """From each token to the next, and from the start of each generation to its first one."""
    total_s: float = 0.0
    sessions_left: int = 0

    @property
    def is_good(self) -> bool:
        return not self.different and not self.failed and not self.sessions_left


class _Failovers(logging.Handler):
    """Counts what the client says of servers that were replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "replaced by" in record.getMessage()


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times_s = [time.monotonic()]

    def put(self, value: torch.Tensor) -> None:
        self.times_s.append(time.monotonic())

    def end(self) -> None:
        pass


class Reaper:
    """Kills a random server at a regular interval, and starts each again after a while, in a thread of its own."""

    def __init__(self, nursery: Nursery, births: Sequence[Birth], settings: Settings, outcome: Outcome) -> None:
        self._nursery = nursery
        self._births = {birth.number: birth for birth in births}
        self._settings = settings
        self._outcome = outcome
        self._rng = random.Random(settings.seed)
        self._pids = {birth.number: nursery.start(birth) for birth in births}
        for pid in self._pids.values():
            nursery.wait_until_ready(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper")

    def start(self) -> None:
        """Begin; the first dies after one interval."""
        self._thread.start()

    def stop(self) -> None:
        """Kill no more, and wait until all servers are up."""
        self._over.set()
        self._thread.join()
        for number, birth in self._births.items():
            if number not in self._pids:
                self._pids[number] = self._nursery.start(birth)
        for pid in self._pids.values():
            self._nursery.wait_until_ready(pid)

    def _run(self) -> None:
        due_s = time.monotonic() + self._settings.kill_every_s
        events: list[tuple[float, int | None]] = [(due_s, None)]
        """When to start a server (its number) again, or to kill one (None)."""
        while True:
            due_s, number = heapq.heappop(events)
            if self._over.wait(max(0.0, due_s - time.monotonic())):
                return
            now_s = time.monotonic()
            self._outcome.late_s = max(self._outcome.late_s, now_s - due_s)
            if number is None and self._settings.waits_for_all and not self._all_are_up():
                heapq.heappush(events, (now_s + _PATIENCE_S, None))
            elif number is None:
                heapq.heappush(events, (due_s + self._settings.kill_every_s, None))
                victim = self._rng.choice(sorted(self._pids))
                os.kill(self._pids.pop(victim), signal.SIGKILL)
                self._outcome.num_kills += 1
                heapq.heappush(events, (due_s + self._settings.restart_after_s, victim))
            else:
                pid = self._pids[number] = self._nursery.start(self._births[number])
                self._outcome.num_restarts += 1
                threading.Thread(target=self._watch, args=(pid, now_s), daemon=True).start()

    def _all_are_up(self) -> bool:
        return len(self._pids) == len(self._births) and all(map(self._nursery.is_ready, self._pids.values()))

    def _watch(self, pid: int, started_s: float) -> None:
        with contextlib.suppress(Exception):  # killed before it was ready
            self._nursery.wait_until_ready(pid)
            self._outcome.up_after_s.append(time.monotonic() - started_s)


def run(settings: Settings, *, tell: Callable[[str], None] = lambda text: None) -> Outcome:
    """Run a swarm whose servers are killed, generate through it, and compare."""
    outcome = Outcome()
    failovers = _Failovers()
    logger = logging.getLogger("petals_client")
    level = logger.level
    logger.addHandler(failovers)
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="petals-soak-") as folder:
        model = make_checkpoint(Path(folder) / "tiny-llama", "llama", num_blocks=NUM_BLOCKS)
        try:
            with Nursery(Path(folder)) as nursery, LocalSwarm() as swarm:
                address = swarm.start_bootstrap()
                births = [
                    Birth(
                        number=number,
                        model=str(model),
                        start=start,
                        end=end,
                        port=free_port(),
                        initial_peers=(address,),
                    )
                    for number, (start, end) in enumerate(SPANS * NUM_COPIES)
                ]
                reaper = Reaper(nursery, births, settings, outcome)
                tell(f"{len(births)} servers are up; one of them dies every {settings.kill_every_s:g} s")
                results = _generate(settings, model, address, reaper, outcome, tell)
        finally:
            logger.removeHandler(failovers)
            logger.setLevel(level)
        outcome.num_failovers = failovers.count
        _compare(results, model, settings, outcome)
    return outcome


def _generate(
    settings: Settings, model: Path, address: str, reaper: Reaper, outcome: Outcome, tell: Callable[[str], None]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Prompts and what the swarm made of them."""
    rng = random.Random(settings.seed + 1)
    results: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    distributed = AutoDistributedModelForCausalLM.from_pretrained(model, initial_peers=[address], dtype=torch.float32)
    try:
        reaper.start()
        started_s = time.monotonic()
        for number in range(settings.num_generations):
            prompt = torch.tensor([[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(4, 24))]])
            clock = _Clock()
            output = None
            try:
                output = distributed.generate(prompt, max_new_tokens=settings.num_tokens, streamer=clock, **_GREEDY)
            except PetalsError as error:
                outcome.failed.append(f"generation {number}: {type(error).__name__}: {error.message}")
            results.append((prompt, output))
            times_s = clock.times_s[:1] + clock.times_s[2:]  # the first that a streamer gets is the prompt
            outcome.token_s += [after - before for before, after in itertools.pairwise(times_s)]
            if (number + 1) % 20 == 0:
                tell(f"{number + 1} generations, {outcome.num_kills} kills, {len(outcome.failed)} failed")
        outcome.total_s = time.monotonic() - started_s
    finally:
        reaper.stop()
        try:
            outcome.sessions_left = distributed.remote_blocks.chain.run(_count_sessions)
        finally:
            distributed.close()
    return results


async def _count_sessions(swarm: Any) -> int:
    """Sessions that the servers still have open some seconds after the last one was closed."""
    import asyncio

    from petals_core.net.rpc import call
    from petals_core.wire.messages import Info, InfoRequest

    count = 0
    for _ in range(50):
        count = 0
        await swarm.directory.refresh()
        for signed in (await swarm.directory.servers()).values():
            with contextlib.suppress(PetalsError):
                reply = await call(await swarm.connect(signed), InfoRequest(), reply=Info, timeout_s=5.0)
                assert isinstance(reply.body, Info)
                count += reply.body.num_sessions
        if count == 0:
            break
        await asyncio.sleep(0.1)
    return count


def _compare(
    results: Sequence[tuple[torch.Tensor, torch.Tensor | None]], model: Path, settings: Settings, outcome: Outcome
) -> None:
    transformers_logging.disable_progress_bar()
    local = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for number, (prompt, output) in enumerate(results):
        if output is None:
            continue
        expected = local.generate(prompt, max_new_tokens=settings.num_tokens, **_GREEDY)
        if torch.equal(output, expected):
            outcome.num_identical += 1
        else:
            outcome.different.append(number)


def free_port() -> int:
    """A port for TCP and UDP that stays free until a server binds it, a second later.

    So it is none of those that systems give to whoever connects (32,768 and above).
    """
    for port in _PORTS:
        with contextlib.suppress(OSError), socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            for each in (tcp, udp):
                each.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the ports never end")


def format_outcome(outcome: Outcome) -> str:
    """The outcome for people."""
    total = outcome.num_identical + len(outcome.different) + len(outcome.failed)
    times_s = sorted(outcome.token_s)
    lines = [
        f"{outcome.num_identical} of {total} generations identical to the local model's, {len(outcome.different)} "
        f"different, {len(outcome.failed)} failed, in {outcome.total_s:.1f} s",
        f"{outcome.num_kills} kills, {outcome.num_restarts} restarts, schedule missed by at most "
        f"{1000 * outcome.late_s:.0f} ms; {outcome.num_failovers} failovers in sessions; "
        f"{outcome.sessions_left} sessions left on servers",
    ]
    if outcome.up_after_s:
        lines.append(
            f"a restarted server is up after {statistics.median(outcome.up_after_s):.2f} s in the median, "
            f"{max(outcome.up_after_s):.2f} s at most"
        )
    if times_s:
        stalls = ", ".join(
            f"{sum(each > bound for each in times_s)} over {bound:g} s"
            for bound in _STALLS_S
            if any(each > bound for each in times_s)
        )
        late_ms = 1000 * times_s[int(0.99 * (len(times_s) - 1))]
        lines.append(
            f"{len(times_s)} tokens: median {1000 * statistics.median(times_s):.1f} ms, 99 % within {late_ms:.0f} ms, "
            f"longest {times_s[-1]:.2f} s; {stalls or 'no stalls'}"
        )
    return "\n".join([*lines, *outcome.failed[:10]])
