"""What ``tools/fault_table.py`` does, once the environment is there."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from local_swarm import LocalSwarm
from nursery import Birth, Holdings, Nursery, name_tasks, open_sockets
from petals_client import AutoDistributedModelForCausalLM
from petals_client.swarm_session import SwarmSession
from petals_core.addresses import Address
from petals_core.errors import PetalsError
from petals_core.identity import Identity, PeerId
from petals_core.net.rpc import call
from petals_core.routing.graph import Hop
from petals_core.testing.factories import VOCABULARY, make_checkpoint
from petals_core.testing.faults import Direction, Fault, FaultKind, FaultProxy
from petals_core.wire.messages import Info, InfoRequest
from soak_run import free_port

FAULTS: Final = ("kill -9", "SIGSTOP", "cut", "delay 5 s", "corrupt", "drop replies", "restart", "drain")
TARGETS: Final = ("first", "middle", "last", "two")
MOMENTS: Final = ("prefill", "step 1", "step 20", "between", "truncate")
SPANS: Final = ((0, 2), (2, 4), (4, 6))
NUM_COPIES: Final = 2
_NUM_TOKENS: Final = 24
_PROMPT_TOKENS: Final = 160
_GREEDY: Final[dict[str, Any]] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "speculation": "off"}
_DELAY_S: Final = 5.0
_SETTLE_S: Final = 5.0
_CACHE_TOKENS: Final = 16_384
_LIFETIME_S: Final = 60.0
"""Of announcements: nodes keep 128 from one machine, those of servers that were killed a moment ago included."""
_ALL_WAYS: Final = ((0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1))
"""Chains that between them use every way from a server to a next one; numbers are of a span's copies."""
_ROUNDING: Final = 4 * 2**-8
"""Of the largest logit: a few units in bfloat16's last place, by which logits of equal caches may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What happens to whom, and when."""

    fault: str
    target: str
    moment: str

    def __str__(self) -> str:
        return f"{self.fault} x {self.target} x {self.moment}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of it."""

    cell: Cell
    problems: tuple[str, ...]
    """Empty: the tokens are those of the local model, nobody else was blamed, nothing is left."""
    total_s: float
    """From the opening of its session to the end."""


class FaultLab:
    """Six server processes behind proxies, which hold every block of a small model twice, and a client."""

    def __init__(self, *, seed: int = 0, torch_dtype: str = "float32") -> None:
        self._rng = random.Random(seed)
        self._torch_dtype = torch_dtype
        self._dtype = getattr(torch, torch_dtype)
        self._resources = contextlib.ExitStack()
        self._proxies: dict[int, FaultProxy] = {}
        self._births: dict[int, Birth] = {}
        self._pids: dict[int, int] = {}
        self._peer_ids: dict[int, PeerId] = {}
        self._numbers = itertools.count(NUM_COPIES)
        self._own_tasks: Counter[str] = Counter()
        """This process's, when they were last counted."""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def _start(self) -> None:
        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()
        folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="petals-faults-")))
        self._folder = folder
        self._model = make_checkpoint(folder / "tiny-llama", "llama", num_blocks=SPANS[-1][1])
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="proxies")
        thread.start()
        self._resources.callback(self._loop.close)
        self._resources.callback(thread.join)
        self._resources.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        self._resources.callback(self._close_proxies)
        self._nursery = self._resources.enter_context(Nursery(folder))
        self._address = self._resources.enter_context(LocalSwarm()).start_bootstrap()
        for number in range(len(SPANS) * NUM_COPIES):
            self._begin(number)
        for pid in self._pids.values():
            self._nursery.wait_until_ready(pid)
        self._local = AutoModelForCausalLM.from_pretrained(self._model, dtype=self._dtype).eval()
        self._distributed = AutoDistributedModelForCausalLM.from_pretrained(
            self._model, initial_peers=[self._address], dtype=self._dtype
        )
        self._resources.callback(self._distributed.close)

    # --- servers ------------------------------------------------------------------------------------------------------

    def _begin(self, number: int) -> None:
        """Start a server, for the first time or again under the same identity and address."""
        birth = self._births.get(number)
        if birth is None:
            start, end = SPANS[number % len(SPANS)]
            port = free_port()
            identity = Identity.load(self._folder / f"server-{number}.key")
            self._peer_ids[number] = identity.peer_id
            identity.release()
            proxy = self._proxies[number] = self._run(FaultProxy(Address("127.0.0.1", port)).__aenter__())
            birth = self._births[number] = Birth(
                number=number,
                model=str(self._model),
                start=start,
                end=end,
                port=port,
                announced_port=proxy.address.port,
                initial_peers=(self._address,),
                torch_dtype=self._torch_dtype,
                cache_tokens=_CACHE_TOKENS,
                lifetime_s=_LIFETIME_S,
                # One that is stopped while it does would leave others a socket until they hear nothing for long.
                measures_neighbours=False,
            )
        self._pids[number] = self._nursery.start(birth)

    def _kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pids[number], signal.SIGKILL)

    def _renew(self, numbers: Sequence[int]) -> None:
        """Take servers that something was done to out of the swarm, and put new ones in their places."""
        for number in numbers:
            self._kill(number)
            self._run(self._proxies.pop(number).__aexit__(None, None, None))
            del self._births[number]
        new = [next(self._numbers) * len(SPANS) + number % len(SPANS) for number in numbers]
        for number in new:
            self._begin(number)
        for number in new:
            self._nursery.wait_until_ready(self._pids[number])

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=60)

    def _close_proxies(self) -> None:
        for proxy in self._proxies.values():
            self._run(proxy.__aexit__(None, None, None))

    # --- one cell -----------------------------------------------------------------------------------------------------

    def run(self, cell: Cell) -> Result:
        """Generate while a fault strikes, and look at what came of it and what is left."""
        struck: list[int] = []
        self._ask(self._forgive)
        self._ask(self._meet)
        # What a client begins with its work, and has for half a minute, is nothing that a cell leaves behind.
        self._distributed.generate(torch.tensor([[3]]), max_new_tokens=1, **_GREEDY)
        before = self._count()
        tasks_before = self._own_tasks
        problems: list[str] = []
        with contextlib.ExitStack() as releases:

            def strike() -> None:
                struck.extend(self._strike(cell, session, releases))

            started_s = time.monotonic()
            length = _PROMPT_TOKENS + 3 * _NUM_TOKENS
            with self._distributed.inference_session(max_length=length) as session:
                try:
                    given, num_before = self._generate(cell, session, strike)
                    problems += self._find_wrong_tokens(given, num_before)
                except PetalsError as error:
                    problems.append(f"{type(error).__name__}: {error.message}")
            total_s = time.monotonic() - started_s
        if not struck:
            problems.append("the fault did not strike")
        victims = {self._peer_ids[number] for number in struck}
        problems += self._ask(lambda swarm: self._find_blamed(swarm, victims))
        remains = self._find_remains(struck, before)
        if more := self._own_tasks - tasks_before:
            remains = [each + (f": {dict(more)}" if each.startswith("the client") else "") for each in remains]
        problems += remains
        self._renew(struck)
        return Result(cell=cell, problems=tuple(problems), total_s=total_s)

    def _generate(self, cell: Cell, session: Any, strike: Callable[[], None]) -> tuple[torch.Tensor, int]:
        """The prompt and its tokens through servers, and how many of them were there when the fault struck."""
        prompt = torch.tensor([[self._rng.randrange(3, VOCABULARY) for _ in range(_PROMPT_TOKENS)]])
        settings = {**_GREEDY, "max_new_tokens": _NUM_TOKENS}
        if cell.moment == "prefill":
            # The first thing that a session does; its servers are known once it is open.
            self._distributed.generate(prompt[:, :1], **{**settings, "max_new_tokens": 1})
            session.truncate(0)
            timer = threading.Timer(self._rng.uniform(0.0, 0.02), strike)
            timer.start()
            given = self._distributed.generate(prompt, **settings)
            timer.join()
            return given, _PROMPT_TOKENS
        if cell.moment.startswith("step"):
            step = int(cell.moment.split()[1])
            striker = _At(step, strike, self._rng.uniform(0.0, 0.003))
            given = self._distributed.generate(prompt, stopping_criteria=[striker], **settings)
            striker.join()
            if not all(torch.equal(seen, given[:, : seen.shape[1]]) for seen in striker.seen):
                raise PetalsError("tokens that were given have changed")
            return given, _PROMPT_TOKENS + step
        given = self._distributed.generate(prompt, **settings)
        if cell.moment == "truncate":
            given = given[:, : _PROMPT_TOKENS + _NUM_TOKENS // 2]
            session.truncate(given.shape[1])
        strike()
        again = self._distributed.generate(None, **settings)
        return torch.cat([given, again], dim=1), given.shape[1]

    def _find_wrong_tokens(self, given: torch.Tensor, num_before: int) -> list[str]:
        """In float32 they are those of the local model.

        In less precise types they are such as the local model gives whose cache is computed anew from those that were
        there when the fault struck, but for ties of rounding.
        """
        num_tokens = given.shape[1] - _PROMPT_TOKENS
        if self._dtype is torch.float32:
            local = {name: value for name, value in _GREEDY.items() if name != "speculation"}
            expected = self._local.generate(given[:, :_PROMPT_TOKENS], **local, max_new_tokens=num_tokens)
            return [] if torch.equal(given, expected) else ["other tokens than the local model"]
        wrong = []
        with torch.no_grad():
            for start, end in ((_PROMPT_TOKENS, num_before), (num_before, given.shape[1])):
                output = self._local(given[:, :start])
                for position in range(start, end):
                    logits, token = output.logits[0, -1].float(), given[0, position]
                    if logits.max() - logits[token] > _ROUNDING * logits.abs().max():
                        wrong.append(f"token {position - _PROMPT_TOKENS} is none of the local model's likeliest")
                    output = self._local(token.view(1, 1), past_key_values=output.past_key_values)
        return wrong

    def _strike(self, cell: Cell, session: Any, releases: contextlib.ExitStack) -> list[int]:
        """Do it; returns the numbers of the servers that it was done to."""
        remote = session._remote  # the chain is nobody's business but the lab's
        numbers = {self._peer_ids[number]: number for number in self._births}
        chain = [numbers[hop.peer_id] for hop in remote.chain]
        wanted = {"first": (0,), "middle": (1,), "last": (2,), "two": self._rng.choice(((0, 1), (1, 2), (0, 2)))}
        struck = [chain[index] for index in wanted[cell.target]]
        for number in struck:
            self._do(cell.fault, number, releases)
        return struck

    def _do(self, fault: str, number: int, releases: contextlib.ExitStack) -> None:
        proxy, pid = self._proxies[number], self._pids[number]
        match fault:
            case "kill -9":
                self._kill(number)
            case "restart":
                self._kill(number)
                self._pids[number] = self._nursery.start(self._births[number])
            case "SIGSTOP":
                os.kill(pid, signal.SIGSTOP)
            case "drain":
                os.kill(pid, signal.SIGTERM)
            case "cut":
                self._loop.call_soon_threadsafe(proxy.cut)
            case "delay 5 s":
                for direction in Direction:
                    self._plan(proxy, Fault(kind=FaultKind.HOLD, direction=direction))
                timer = threading.Timer(_DELAY_S, lambda: self._loop.call_soon_threadsafe(proxy.release))
                timer.start()
                releases.callback(timer.join)
            case "corrupt":
                self._plan(proxy, Fault(kind=FaultKind.CORRUPT, direction=Direction.TO_DIALER))
            case "drop replies":
                self._plan(proxy, Fault(kind=FaultKind.DROP, direction=Direction.TO_DIALER))
            case _:
                raise ValueError(fault)

    def _plan(self, proxy: FaultProxy, fault: Fault) -> None:
        self._loop.call_soon_threadsafe(proxy.add, fault)

    # --- what is left -------------------------------------------------------------------------------------------------

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        return self._distributed.remote_blocks.chain.run(question)

    async def _forgive(self, swarm: Any) -> None:
        await swarm.directory.refresh()
        for number in self._births:
            swarm.praise(self._peer_ids[number])

    async def _meet(self, swarm: Any) -> None:
        """Have all servers connected to each other and the client, so that a cell adds no connection that stays."""
        servers = await swarm.directory.servers()
        copies = [[number for number in self._births if number % len(SPANS) == index] for index in range(len(SPANS))]
        for way in _ALL_WAYS:
            chain = tuple(
                Hop(peer_id=self._peer_ids[copies[index][copy]], start=span[0], end=span[1])
                for index, (copy, span) in enumerate(zip(way, SPANS, strict=True))
            )
            session = SwarmSession(swarm, start=0, end=SPANS[-1][1], num_rows=1, max_length=8)
            await session.open((chain, servers))
            session.close()

    def _count(self) -> dict[int | None, Holdings]:
        """What servers hold, by their numbers, and the client's part of this process."""
        held: dict[int | None, Holdings] = {
            number: self._nursery.count(pid) for number, pid in self._pids.items() if number in self._births
        }
        held[None] = self._ask(self._count_own)
        return held

    async def _count_own(self, swarm: Any) -> Holdings:
        ports = {proxy.address.port for proxy in self._proxies.values()}
        self._own_tasks = name_tasks()
        return Holdings(
            num_tasks=self._own_tasks.total(),
            num_streams=sum(connection.num_streams for connection in swarm._dialer._connections.values()),
            num_sockets=sum(_far_port(descriptor) in ports for descriptor in open_sockets()),
        )

    async def _find_blamed(self, swarm: Any, victims: set[PeerId]) -> list[str]:
        healthy = {self._peer_ids[number] for number in self._births} - victims
        return [f"{peer.short} was blamed" for peer in healthy if swarm.health.num_failures(peer)]

    def _find_remains(self, struck: Sequence[int], before: dict[int | None, Holdings]) -> list[str]:
        """What is still there on servers that live, and in this process, some seconds later."""
        deadline_s = time.monotonic() + _SETTLE_S
        healthy = [number for number in self._births if number not in struck]
        while True:
            problems: list[str] = self._ask(lambda swarm: self._find_pages(swarm, healthy))
            for number in (*healthy, None):
                now = self._ask(self._count_own) if number is None else self._nursery.count(self._pids[number])
                name = "the client" if number is None else self._peer_ids[number].short
                for what in ("tasks", "streams", "sockets"):
                    more = getattr(now, f"num_{what}") - getattr(before[number], f"num_{what}")
                    problems += [f"{name} has {more} {what} more than before"] if more > 0 else []
            if not problems or time.monotonic() >= deadline_s:
                return problems
            time.sleep(0.05)

    async def _find_pages(self, swarm: Any, numbers: Sequence[int]) -> list[str]:
        """Sessions and pages that servers still hold."""
        servers = await swarm.directory.servers()
        problems = []
        for peer in (self._peer_ids[number] for number in numbers):
            if peer not in servers:
                problems.append(f"{peer.short} is not announced")
                continue
            reply = await call(await swarm.connect(servers[peer]), InfoRequest(), reply=Info, timeout_s=5.0)
            assert isinstance(reply.body, Info)
            if reply.body.num_sessions:
                problems.append(f"{peer.short} has {reply.body.num_sessions} sessions")
            elif reply.body.cache_tokens_left != _CACHE_TOKENS:
                problems.append(f"{peer.short} has pages left")
        return problems


def _far_port(descriptor: int) -> int | None:
    """The port at the other end of a socket; None: there is none."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as twin:
        if twin.family in (socket.AF_INET, socket.AF_INET6):
            port: int = twin.getpeername()[1]
            return port
    return None


class _At:
    """A stopping criterion that never stops: some time after a step's token has come, something happens beside it."""

    def __init__(self, step: int, action: Callable[[], None], after_s: float) -> None:
        self._step = step
        self._count = 0
        self.seen: list[torch.Tensor] = []
        """All tokens, as they were after each step."""
        self._timer = threading.Timer(after_s, action)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._count += 1
        self.seen.append(input_ids.clone())
        if self._count == self._step:
            self._timer.start()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def join(self) -> None:
        self._timer.join()


def cells(faults: Sequence[str], targets: Sequence[str], moments: Sequence[str]) -> Iterator[Cell]:
    """All combinations."""
    for fault, target, moment in itertools.product(faults, targets, moments):
        yield Cell(fault=fault, target=target, moment=moment)


def quiet() -> None:
    """Failures are what this is about: the client need not tell of them."""
    logging.getLogger("petals_client").setLevel(logging.CRITICAL)
