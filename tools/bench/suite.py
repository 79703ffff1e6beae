"""Runs a plan: starts swarms and workers, lets the modes of a cell take turns, and collects figures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import local_swarm
from bench import earlier, text
from bench.budget import Budget
from bench.conversation import Worker
from bench.figures import Figure, speed_ratios
from bench.memory_limit import MemoryLimit, memory_limit
from bench.plan import Cell, Kind, Mode, Model, Network, Plan
from lab import router, sandbox

TOOLS = Path(__file__).resolve().parent.parent
LAB_HOSTS = ("client", "directory", "server1", "server2", "server3")
"""Hosts of the lab that the suite runs in."""
NO_LIMITS = "delay=0ms,rate=unlimited"
START_TIMEOUT_S = 90.0
WORKERS_AT_ONCE = 2
"""Are started; more would only wait for each other's imports."""
DISK_SHARE = 0.25
"""Disk offloading gets memory for this share of the model's weights, less than half of what one A100 has for those of
BLOOM-176B in int8."""
COMPUTING_BYTES = 96 << 20
"""And this for what it computes."""
STOP_TIMEOUT_S = 2.0
"""Processes of Petals 2.2.0 leave nothing behind that a longer wait would save."""
LEAST_DECODING_S = 2.0
"""So long one mode decodes in one round at least, however many modes and cells there are."""
PATIENCE, LEAST_TIMEOUT_S = 5.0, 10.0
"""A mode may take so many times as long as in earlier rounds, and so much more."""
OVERDRAFT = 1.5
"""A cell may take so many times its share for as long as it has fewer rounds than it should have."""
TRIES = 2
"""A mode may fail so many times in a cell; then the others go on without it."""
MAX_FAILURES = 4
"""In a row on one network; then a mode is not tried there any more, so that one that hangs leaves time for others."""
_TIME_IS_UP = "not measured, because the time was up"
_WARM_ROUNDS = 3
"""So many rounds, and the first one only warms up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model that is run."""

    title: str
    folder: Path
    num_blocks: int
    weight_bytes: int
    hub: Path
    """A cache of the hub with this model alone, for Petals 2.2.0."""
    prompts: Sequence[Sequence[int]] | None
    """What is continued, one a round; None: any tokens."""
    variables: Mapping[str, str]
    """Of the environment of whoever computes with it, local or client."""


class Suite:
    """One run of a plan."""

    def __init__(
        self,
        plan: Plan,
        models: Mapping[Model, Checkpoint],
        scratch: Path,
        *,
        timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        self.notes: list[str] = []
        """What readers of the figures must know."""
        self._plan = plan
        self.models = models
        self._scratch = scratch
        self._timeout_s = timeout_s
        self._say = say
        self._earlier: Path | None = None
        """The Python of Petals 2.2.0."""
        self._num_servers = 0
        self._budget = self._new_budget()

    def run(self) -> Iterator[Figure]:
        """Measure everything; figures come as soon as their cell is done. What fails is a figure that says why."""
        self._leave_out_what_is_missing()
        self._budget = self._new_budget()
        for is_lab in (False, True):
            for model in Model:
                if cells := self._plan.cells(model=model, is_lab=is_lab):
                    yield from self._run_stage_safely(model, cells, is_lab=is_lab)

    def _new_budget(self) -> Budget:
        now_s, cells = time.monotonic(), self._plan.cells()
        servers = {
            (cell.scenario.model, cell.network.host is None, mode.swarm)
            for cell in cells
            for mode in cell.modes
            if mode.kind.has_network
        }
        workers = {(cell.scenario.model, cell.network.name, mode.name) for cell in cells for mode in cell.modes}
        return Budget(
            end_s=now_s + 60 * self._plan.minutes,
            last_s=now_s + 60 * self._plan.most_minutes,
            weight_left=sum(cell.weight for cell in cells),
            num_cells=len(cells),
            swarms_left=len(servers),
            workers_left=len(workers),
        )

    @property
    def _is_late(self) -> bool:
        return self._budget.is_late(time.monotonic())

    def _limit_s(self, most_s: float) -> float:
        return self._budget.limit_s(time.monotonic(), most_s)

    def _run_stage_safely(self, model: Model, cells: list[Cell], *, is_lab: bool) -> Iterator[Figure]:
        """Measure cells that share servers; whatever happens, each mode of each cell gets a figure."""
        left = {
            (cell.network.name, cell.scenario.name, mode.name): (cell, mode) for cell in cells for mode in cell.modes
        }
        reason = _TIME_IS_UP
        if not self._is_late:
            try:
                with contextlib.ExitStack() as stack:
                    for figure in self._run_stage(model, cells, stack, is_lab=is_lab):
                        left.pop((figure.network, figure.scenario, figure.mode), None)
                        yield figure
            except Exception as error:  # the next stage has servers of its own
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                self._say(f"  stopped: {reason}")
        yield from (self._nothing(cell, mode, reason) for cell, mode in left.values())

    def _run_stage(
        self, model: Model, cells: list[Cell], stack: contextlib.ExitStack, *, is_lab: bool
    ) -> Iterator[Figure]:
        """Measure cells that share servers."""
        addresses: dict[str, str | Exception] = {}
        for mode in {mode.swarm: mode for cell in cells for mode in cell.modes if mode.kind.has_network}.values():
            title = mode.title.partition(", drafts")[0]
            self._say(f"starting {title}{' in the network lab' if is_lab else ''}, {model} model")
            try:
                addresses[mode.swarm] = stack.enter_context(self._swarm(mode, self.models[model], is_lab=is_lab))
            except Exception as error:  # others can go on without it
                self._say(f"  {title}: {error}")
                addresses[mode.swarm] = error
            self._budget.swarms_left -= 1
        for network in dict.fromkeys(cell.network for cell in cells):
            if network.host is not None:
                router.ask(sandbox.current_folder(), dict.fromkeys(LAB_HOSTS, network.host))
            there = [cell for cell in cells if cell.network is network]
            with _Workers(self, model, network, addresses) as workers:
                modes = list({mode.name: mode for cell in there for mode in cell.modes}.values())
                self._say(f"{network.title}: starting {len(modes)} clients")
                self._start(modes, workers)
                for cell in there:
                    yield from self._measure(cell, workers)
            if network.host is not None:  # the next one begins, and the swarm ends, on quick links
                router.ask(sandbox.current_folder(), dict.fromkeys(LAB_HOSTS, NO_LIMITS))

    def _measure(self, cell: Cell, workers: _Workers) -> Iterator[Figure]:
        """Let the modes take turns until the time is spent; of several rounds the first one only warms up."""
        began_s = started_s = time.monotonic()
        share_s = self._budget.begin(cell.weight, began_s)
        self._say(f"{cell.network.title}: {cell.scenario.title} ({share_s:.0f} s; {self._budget.progress(began_s)})")
        rounds: list[dict[str, float | None]] = []
        errors: dict[str, str] = {}
        failures: dict[str, int] = {}
        longest_s: dict[str, float] = {}
        """By mode: the longest of its rounds so far."""
        most_s = max(LEAST_DECODING_S, share_s / len(cell.modes) / (self._plan.min_rounds + 1))
        while len(rounds) < self._plan.max_rounds and not self._is_late:
            now_s = time.monotonic()
            if rounds:
                expected_s = now_s - began_s + (now_s - started_s) / len(rounds)
                is_enough = len(rounds) >= self._plan.min_rounds
                if expected_s > (share_s if is_enough else OVERDRAFT * share_s):
                    break
            request = workers.request(cell, len(rounds), most_s)
            current: dict[str, float | None] = dict.fromkeys((mode.name for mode in cell.modes), None)
            for mode in cell.modes:
                for _ in range(TRIES):
                    if current[mode.name] is None and failures.get(mode.name, 0) < TRIES:
                        current[mode.name] = self._ask(mode, request, errors, longest_s, workers)
                        failures[mode.name] = failures.get(mode.name, 0) + (current[mode.name] is None)
            rounds.append(current)
        if len(rounds) >= _WARM_ROUNDS:
            del rounds[0]
        for mode in cell.modes:
            values = [each[mode.name] for each in rounds]
            found = tuple(value for value in values if value is not None)
            theirs = [each[cell.reference.name] for each in rounds]
            error = errors.get(mode.name)
            if found and error == _TIME_IS_UP:
                error = None
            figure = self._nothing(cell, mode, error if found or error else _TIME_IS_UP)
            ratios = () if mode == cell.reference else speed_ratios(cell.scenario.unit, values, theirs)
            yield dataclasses.replace(figure, values=found, ratios=ratios)

    def _ask(
        self,
        mode: Mode,
        request: Mapping[str, Any],
        errors: dict[str, str],
        longest_s: dict[str, float],
        workers: _Workers,
    ) -> float | None:
        """A mode's figure of one round, None where there is none."""
        if self._is_late:
            return None
        errors.pop(mode.name, None)
        if reason := workers.given_up(mode):
            errors[mode.name] = reason
            return None
        limit_s = self._limit_s(min(self._timeout_s, PATIENCE * longest_s.get(mode.name, math.inf) + LEAST_TIMEOUT_S))
        started_s = time.monotonic()
        value: float | None = self._attempt(
            mode, errors, functools.partial(workers.ask, mode, request, limit_s), workers
        )
        if value is not None:
            longest_s[mode.name] = max(longest_s.get(mode.name, 0.0), time.monotonic() - started_s)
        return value

    def _start(self, modes: Sequence[Mode], workers: _Workers) -> None:
        """Start the workers of modes; those that fail are tried again when they are asked."""
        with ThreadPoolExecutor(WORKERS_AT_ONCE) as pool:
            pool.map(lambda mode: self._attempt(mode, {}, functools.partial(workers.of, mode), workers), modes)
        self._budget.workers_left -= len(modes)

    def _attempt(self, mode: Mode, errors: dict[str, str], action: Callable[[], Any], workers: _Workers) -> Any:
        """What ``action`` returns, or None where it fails: then the mode has an error, and a new worker next time."""
        try:
            found = action()
        except Exception as error:  # whatever it is, it is this mode's alone
            errors[mode.name] = _TIME_IS_UP if self._is_late else str(error).partition("\n")[0] or type(error).__name__
            self._say(f"  {mode.title}: {error}")
            workers.drop(mode, errors[mode.name])  # after an error nobody knows what state it is in
            return None
        workers.note_success(mode)
        return found

    def _nothing(self, cell: Cell, mode: Mode, error: str | None) -> Figure:
        return Figure(
            network=cell.network.name,
            scenario=cell.scenario.name,
            mode=mode.name,
            unit=cell.scenario.unit,
            values=(),
            reference=cell.reference.name,
            ratios=(),
            error=error,
        )

    @contextlib.contextmanager
    def _swarm(self, mode: Mode, model: Checkpoint, *, is_lab: bool) -> Iterator[str]:
        """Servers for a mode; gives the address to join by."""
        if mode.kind is Kind.EARLIER:
            with self._earlier_swarm(mode, model, is_lab=is_lab) as address:
                yield address
            return
        with local_swarm.LocalSwarm() as swarm:
            swarm.start_bootstrap(place=place("directory", is_lab))
            servers = [
                swarm.start_server(model.folder, start, end, place=place(f"server{number}", is_lab))
                for number, (start, end) in enumerate(local_swarm.spans(model.num_blocks, mode.num_servers), 1)
            ]
            for server in servers:
                server.wait_for(local_swarm.READY, self._limit_s(START_TIMEOUT_S))
            yield swarm.address

    @contextlib.contextmanager
    def _earlier_swarm(self, mode: Mode, model: Checkpoint, *, is_lab: bool) -> Iterator[str]:
        """Servers of Petals 2.2.0, the first of which others join by."""
        assert self._earlier is not None
        address: str | None = None
        servers: list[local_swarm.Process] = []
        with contextlib.ExitStack() as stack:
            for number, blocks in enumerate(local_swarm.spans(model.num_blocks, mode.num_servers), 1):
                where = place(f"server{number}", is_lab)
                self._num_servers += 1  # no two share a port or a key
                command = earlier.server_command(
                    self._earlier,
                    model.hub,
                    blocks,
                    address,
                    host=where.host,
                    port=earlier.PORT + self._num_servers if is_lab else None,
                    identity=self._scratch / f"earlier-{self._num_servers}.key",
                )
                environment = {**os.environ, **earlier.variables(model.hub)}
                server = local_swarm.Process(f"{mode.title} {number}", [*where.prefix, *command], environment)
                stack.callback(server.stop, STOP_TIMEOUT_S)
                servers.append(server)
                if address is None:
                    pattern = earlier.address_pattern(where.host)
                    address = server.wait_for(pattern, self._limit_s(START_TIMEOUT_S))[1][0]
            for server in servers:
                server.wait_for(earlier.READY, self._limit_s(START_TIMEOUT_S))
            assert address is not None
            yield address
            for server in servers:
                server.interrupt()

    def _leave_out_what_is_missing(self) -> None:
        """Get Petals 2.2.0 ready, if it is to be measured, or go on without it."""
        if not any(mode.kind is Kind.EARLIER for mode in self._plan.modes):
            return
        try:
            self._earlier = earlier.prepare(self._say)
        except earlier.UnavailableError as error:
            self._say(f"Petals 2.2.0 is skipped: {error}")
            self._note(f"Petals 2.2.0 is skipped: {error}")
            modes = [mode for mode in self._plan.modes if mode.kind is not Kind.EARLIER]
            self._plan = dataclasses.replace(self._plan, modes=modes)
            return
        for model in self.models.values():
            earlier.make_hub(model.folder, model.hub)

    def start_worker(
        self, mode: Mode, model: Checkpoint, network: Network, address: str, stack: contextlib.ExitStack
    ) -> Worker:
        """Start the process that runs a mode; it is stopped with ``stack``.

        Raises:
            WorkerError: the model couldn't be loaded or run.
        """
        prefix = place("client", network.host is not None).prefix if mode.kind.has_network else ()
        if mode.kind is Kind.EARLIER:
            program = [str(self._earlier), "-m", "bench.earlier_worker", earlier.MODEL_NAME, address, str(model.hub)]
            variables = {**earlier.variables(model.hub), "PYTHONPATH": str(TOOLS)}
            worker = Worker(mode.name, [*prefix, *program], variables)
            stack.callback(worker.stop, STOP_TIMEOUT_S)
            worker.receive(self._limit_s(START_TIMEOUT_S))
            return worker
        scratch = self._scratch / f"{mode.name}-{model.num_blocks}"
        scratch.mkdir(exist_ok=True)
        draft = str(text.DRAFT) if mode.has_drafts else ""
        folder = _uncached_copy(model.folder, scratch) if mode.kind is Kind.DISK_OFFLOAD else model.folder
        arguments = [mode.kind, str(folder), address, str(scratch), draft]
        program = [*prefix, sys.executable, "-m", "bench.worker", *arguments]
        worker = Worker(mode.name, program, {"PYTHONPATH": str(TOOLS), "OMP_WAIT_POLICY": "PASSIVE", **model.variables})
        group = self._memory_group(worker, stack) if mode.kind is Kind.DISK_OFFLOAD else None
        stack.callback(worker.stop)
        worker.receive(self._limit_s(START_TIMEOUT_S))
        if group is not None:
            group.limit(group.own_bytes() + int(DISK_SHARE * model.weight_bytes) + COMPUTING_BYTES)
            self._note(
                f"disk offload: memory for {DISK_SHARE:.0%} of the weights and {COMPUTING_BYTES >> 20} MiB to compute "
                "with, beside what the process had taken when it was ready; the system's cache of files counts"
            )
        return worker

    def _memory_group(self, worker: Worker, stack: contextlib.ExitStack) -> MemoryLimit | None:
        """Count what a worker takes, so that it can get less memory than its weights need, page cache included."""
        try:
            group = stack.enter_context(memory_limit())
            group.add(worker.pid)
        except OSError as error:
            self._note(f"disk offload: no memory limit ({error}), so weights may come from the system's cache of files")
            return None
        return group

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class _Workers:
    """The processes of one network; each is started when it is first needed, and again when it has failed."""

    def __init__(self, suite: Suite, model: Model, network: Network, addresses: Mapping[str, str | Exception]) -> None:
        self._suite = suite
        self._model = suite.models[model]
        self._network = network
        self._addresses = addresses
        self._stacks: dict[str, contextlib.ExitStack] = {}
        self._workers: dict[str, Worker] = {}
        self._failures: dict[str, int] = {}
        """By mode: in a row."""
        self._reasons: dict[str, str] = {}

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as stack:
            for each in self._stacks.values():
                stack.push(each)

    def request(self, cell: Cell, number: int, most_s: float) -> dict[str, Any]:
        """What the workers of a cell are asked in one round: to decode no longer than ``most_s``."""
        prompts = self._model.prompts
        prompt = None if prompts is None else prompts[number % len(prompts)]
        return {**dataclasses.asdict(cell.scenario), "most_s": most_s, "prompt": prompt}

    def of(self, mode: Mode) -> Worker:
        """The worker of a mode.

        Raises:
            WorkerError: it couldn't be started.
            ProcessError: its servers couldn't.
        """
        if mode.name not in self._workers:
            address = self._addresses[mode.swarm] if mode.kind.has_network else ""
            if isinstance(address, Exception):
                raise address
            stack = self._stacks[mode.name] = contextlib.ExitStack()
            self._workers[mode.name] = self._suite.start_worker(mode, self._model, self._network, address, stack)
        return self._workers[mode.name]

    def ask(self, mode: Mode, request: Mapping[str, Any], timeout_s: float) -> float:
        """The figure of a mode in one round; ``of`` and ``Worker.ask`` say what is raised."""
        value: float = self.of(mode).ask(request, timeout_s)["value"]
        return value

    def drop(self, mode: Mode, reason: str) -> None:
        """Stop the worker of a mode, which has failed; the next one is new."""
        self._failures[mode.name] = self._failures.get(mode.name, 0) + 1
        self._reasons[mode.name] = reason
        self._workers.pop(mode.name, None)
        if stack := self._stacks.pop(mode.name, None):
            with contextlib.suppress(Exception):  # what can't be stopped is in nobody's way
                stack.close()

    def note_success(self, mode: Mode) -> None:
        """A mode has done what it was asked for."""
        self._failures.pop(mode.name, None)

    def given_up(self, mode: Mode) -> str | None:
        """Why a mode is not tried any more; None: it is."""
        if self._failures.get(mode.name, 0) < MAX_FAILURES:
            return None
        return f"given up after {MAX_FAILURES} failures in a row: {self._reasons[mode.name]}"


def _uncached_copy(folder: Path, scratch: Path) -> Path:
    """A checkpoint of which nothing is in memory: pages that others have read would not count for who uses them."""
    copy = scratch / "checkpoint"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    for path in copy.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return copy


def place(host: str, is_lab: bool) -> local_swarm.Place:
    """Where a host's processes run."""
    if not is_lab:
        return local_swarm.LOOPBACK
    prefix = (sys.executable, str(TOOLS / "network_lab.py"), "--on", host, "--")
    return local_swarm.Place(host=sandbox.address_of(LAB_HOSTS.index(host)), prefix=prefix)
