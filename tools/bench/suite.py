"""Runs a plan: starts swarms and workers, lets the modes of a cell take turns, and collects figures."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import local_swarm
from bench import earlier
from bench.conversation import Worker, WorkerError
from bench.figures import Figure, speed_ratios
from bench.memory_limit import MemoryLimit, memory_limit
from bench.plan import Kind, Mode, Network, Plan, Scenario
from lab import router, sandbox

TOOLS = Path(__file__).resolve().parent.parent
LAB_HOSTS = ("client", "directory", "server1", "server2", "server3")
"""Hosts of the lab that the suite runs in."""
NO_LIMITS = "delay=0ms,rate=unlimited"
START_TIMEOUT_S = 180.0
DISK_SHARE = 0.5
"""Disk offloading gets memory for this share of the model's weights."""


class Suite:
    """One run of a plan with one model."""

    def __init__(
        self,
        plan: Plan,
        model: Path,
        scratch: Path,
        *,
        num_blocks: int,
        weight_bytes: int,
        timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        self.notes: list[str] = []
        """What readers of the figures must know."""
        self._plan = plan
        self._model = model
        self._scratch = scratch
        self._num_blocks = num_blocks
        self._weight_bytes = weight_bytes
        self._timeout_s = timeout_s
        self._say = say
        self._earlier: Path | None = None
        """The Python of Petals 2.2.0."""
        self._hub = scratch / "hub" / "hub"

    def run(self) -> Iterator[Figure]:
        """Measure everything; figures come as soon as their cell is done."""
        self._leave_out_what_is_missing()
        end_s = time.monotonic() + 60 * self._plan.minutes
        cells_left = len(self._plan.cells())
        for is_lab in (False, True):
            networks = [network for network in self._plan.networks if (network.host is not None) is is_lab]
            if not networks:
                continue
            with contextlib.ExitStack() as stack:
                modes = self._plan.modes_of(networks[0])
                swarms = {
                    mode.name: stack.enter_context(self._swarm(mode, is_lab)) for mode in modes if mode.kind.has_network
                }
                for network in networks:
                    if network.host is not None:
                        router.ask(sandbox.current_folder(), dict.fromkeys(LAB_HOSTS, network.host))
                    with _Workers(self, network, swarms) as workers:
                        for scenario in self._plan.scenarios:
                            share_s = (end_s - time.monotonic()) / cells_left
                            self._say(f"{network.title}: {scenario.title}")
                            yield from self._measure(network, scenario, workers, share_s)
                            cells_left -= 1
                    if network.host is not None:  # the next one begins, and the swarm ends, on quick links
                        router.ask(sandbox.current_folder(), dict.fromkeys(LAB_HOSTS, NO_LIMITS))

    def _measure(self, network: Network, scenario: Scenario, workers: _Workers, share_s: float) -> Iterator[Figure]:
        """Let the modes take turns until the time is spent. The first round warms up, and counts only if it has to."""
        modes = self._plan.modes_of(network)
        rounds: list[dict[str, float | None]] = []
        errors: dict[str, str] = {}
        started_s = time.monotonic()
        while len(rounds) <= self._plan.max_rounds:
            elapsed_s = time.monotonic() - started_s
            mean_s = elapsed_s / len(rounds) if rounds else 0.0
            if len(rounds) >= self._plan.min_rounds and elapsed_s + mean_s > share_s:
                break
            current: dict[str, float | None] = dict.fromkeys((mode.name for mode in modes), None)
            for mode in modes:
                if mode.name in errors:
                    continue
                try:
                    request = dataclasses.asdict(scenario)
                    current[mode.name] = workers.of(mode).ask(request, self._timeout_s)["value"]
                except (WorkerError, local_swarm.ProcessError) as error:
                    errors[mode.name] = str(error)
                    self._say(f"  {mode.title}: {error}")
                    workers.drop(mode)  # after an error nobody knows what state it is in
            rounds.append(current)
            if len(errors) == len(modes):
                break
        if len(rounds) > self._plan.min_rounds:
            del rounds[0]
        reference = self._plan.reference_of(network).name
        for mode in modes:
            values = [each[mode.name] for each in rounds]
            theirs = [each[reference] for each in rounds]
            yield Figure(
                network=network.name,
                scenario=scenario.name,
                mode=mode.name,
                unit=scenario.unit,
                values=tuple(value for value in values if value is not None),
                reference=reference,
                ratios=() if mode.name == reference else speed_ratios(scenario.unit, values, theirs),
                error=errors.get(mode.name),
            )

    @contextlib.contextmanager
    def _swarm(self, mode: Mode, is_lab: bool) -> Iterator[str]:
        """Servers for a mode; gives the address to join by."""
        self._say(f"starting {mode.title}{' in the network lab' if is_lab else ''}")
        if mode.kind is Kind.EARLIER:
            with self._earlier_swarm(mode, is_lab) as address:
                yield address
            return
        with local_swarm.LocalSwarm() as swarm:
            swarm.start_bootstrap(place=place("directory", is_lab))
            servers = [
                swarm.start_server(self._model, start, end, place=place(f"server{number}", is_lab))
                for number, (start, end) in enumerate(local_swarm.spans(self._num_blocks, mode.num_servers), 1)
            ]
            for server in servers:
                server.wait_for(local_swarm.READY, START_TIMEOUT_S)
            yield swarm.address

    @contextlib.contextmanager
    def _earlier_swarm(self, mode: Mode, is_lab: bool) -> Iterator[str]:
        """Servers of Petals 2.2.0, the first of which others join by."""
        assert self._earlier is not None
        address: str | None = None
        servers: list[local_swarm.Process] = []
        with contextlib.ExitStack() as stack:
            for number, blocks in enumerate(local_swarm.spans(self._num_blocks, mode.num_servers), 1):
                where = place(f"server{number}", is_lab)
                identity = self._scratch / f"{mode.name}-{number}{'-lab' if is_lab else ''}.key"
                command = earlier.server_command(
                    self._earlier, self._hub, blocks, address, host=where.host, identity=identity
                )
                environment = {**os.environ, **earlier.variables(self._hub)}
                server = local_swarm.Process(f"{mode.title} {number}", [*where.prefix, *command], environment)
                stack.callback(server.stop)
                servers.append(server)
                if address is None:
                    address = server.wait_for(earlier.address_pattern(where.host), START_TIMEOUT_S)[1][0]
            for server in servers:
                server.wait_for(earlier.READY, START_TIMEOUT_S)
            assert address is not None
            yield address

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
        earlier.make_hub(self._model, self._hub)

    def start_worker(self, mode: Mode, network: Network, address: str, stack: contextlib.ExitStack) -> Worker:
        """Start the process that runs a mode; it is stopped with ``stack``.

        Raises:
            WorkerError: the model couldn't be loaded or run.
        """
        prefix = place("client", network.host is not None).prefix if mode.kind.has_network else ()
        if mode.kind is Kind.EARLIER:
            program = [str(self._earlier), "-m", "bench.earlier_worker", earlier.MODEL_NAME, address, str(self._hub)]
            worker = Worker(mode.name, [*prefix, *program], {**earlier.variables(self._hub), "PYTHONPATH": str(TOOLS)})
            stack.callback(worker.stop)
            worker.receive(START_TIMEOUT_S)
            return worker
        program = [sys.executable, "-m", "bench.worker"]
        scratch = self._scratch / mode.name
        scratch.mkdir(exist_ok=True)
        arguments = [*prefix, *program, mode.kind, str(self._model), address, str(scratch)]
        worker = Worker(mode.name, arguments, {"PYTHONPATH": str(TOOLS)})
        group = self._memory_group(worker, stack) if mode.kind is Kind.DISK_OFFLOAD else None
        stack.callback(worker.stop)
        worker.receive(START_TIMEOUT_S)
        if group is not None:
            num_bytes = group.own_bytes() + int(DISK_SHARE * self._weight_bytes)
            group.limit(num_bytes)
            self._note(
                f"disk offload: memory for {DISK_SHARE:.0%} of the weights beside what the process had taken when it "
                f"was ready, {num_bytes >> 20} MiB together; the system's cache of files counts"
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

    def __init__(self, suite: Suite, network: Network, addresses: dict[str, str]) -> None:
        self._suite = suite
        self._network = network
        self._addresses = addresses
        self._stacks: dict[str, contextlib.ExitStack] = {}
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as stack:
            for each in self._stacks.values():
                stack.push(each)

    def of(self, mode: Mode) -> Worker:
        """The worker of a mode."""
        if mode.name not in self._workers:
            stack = self._stacks[mode.name] = contextlib.ExitStack()
            address = self._addresses.get(mode.name, "")
            self._workers[mode.name] = self._suite.start_worker(mode, self._network, address, stack)
        return self._workers[mode.name]

    def drop(self, mode: Mode) -> None:
        """Stop the worker of a mode; the next one is new."""
        self._workers.pop(mode.name, None)
        self._stacks.pop(mode.name).close()


def place(host: str, is_lab: bool) -> local_swarm.Place:
    """Where a host's processes run."""
    if not is_lab:
        return local_swarm.LOOPBACK
    prefix = (sys.executable, str(TOOLS / "network_lab.py"), "--on", host, "--")
    return local_swarm.Place(host=sandbox.address_of(LAB_HOSTS.index(host)), prefix=prefix)
