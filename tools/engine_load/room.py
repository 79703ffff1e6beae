"""Room in the attention cache: how many sessions share it, and what happens when far too many come."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from engine_load.clients import Peer, Session, connected, states
from engine_load.figures import Figure, at_least, at_most, note
from engine_load.servers import Server, serving
from petals_core.errors import CacheLostError, OverloadedError

NUM_BLOCKS, WIDTH = 12, 1024
RESERVED_SESSIONS, RESERVED_LENGTH = 16, 2048
MIN_SESSIONS, USED_TOKENS = 64, 400
CACHE_TOKENS = 4096
PROMPT_TOKENS, NEW_TOKENS, MAX_LENGTH = 192, 24, 224
OVERLOAD = 10
DEADLINE_S = 10.0
PAUSE_S = 0.1
"""Of a client between steps, as if it chose a token."""
MAX_SLOWDOWN = 1.15
MAX_RELATIVE_ERROR = 1e-5
_NUM_INPUTS = 4
_PROBE_STEPS = 100


async def measure_sessions(folder: Path) -> list[Figure]:
    """As many sessions as fit where reserving ``max_length`` would hold 16."""
    cache_tokens = RESERVED_SESSIONS * RESERVED_LENGTH
    prompt, token = states(USED_TOKENS - 4, WIDTH, torch.float32), states(1, WIDTH, torch.float32)
    with serving(folder, NUM_BLOCKS, "--attn-cache-tokens", str(cache_tokens)) as server:
        before_bytes = server.pss_bytes()
        async with connected(server.address, 8) as peers:

            async def run(number: int) -> Session:
                session = await peers[number % len(peers)].open(max_length=RESERVED_LENGTH, deadline_s=DEADLINE_S)
                await session.step(prompt)
                for _ in range(4):
                    await session.step(token)
                return session

            outcomes = await asyncio.gather(*map(run, range(MIN_SESSIONS)), return_exceptions=True)
            info = await peers[0].info()
            used_bytes = server.pss_bytes() - before_bytes
    num_running = sum(isinstance(outcome, Session) for outcome in outcomes)
    errors = Counter(str(outcome) for outcome in outcomes if not isinstance(outcome, Session))
    figures = [
        note("cache", f"{cache_tokens} tokens: {RESERVED_SESSIONS} sessions of max_length {RESERVED_LENGTH}"),
        at_least(f"sessions of {USED_TOKENS} tokens at once", num_running, MIN_SESSIONS),
        note("sessions open at the end, tokens left", f"{info.num_sessions}, {info.cache_tokens_left}"),
        note("memory that the server took for them", f"{used_bytes / 2**20:.0f} MiB"),
    ]
    return figures + [note(f"{count} times", text) for text, count in errors.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Inputs of a session, and what comes out of a server that has nothing else to do."""

    prompt: torch.Tensor
    token: torch.Tensor
    outputs: list[torch.Tensor]


async def measure_overload(folder: Path) -> list[Figure]:
    """Ten times as many sessions as the cache holds, each with a deadline of 10 s."""
    num_fitting = CACHE_TOKENS // MAX_LENGTH
    count = OVERLOAD * num_fitting
    with serving(folder, NUM_BLOCKS, "--attn-cache-tokens", str(CACHE_TOKENS)) as server:
        async with connected(server.address, 20) as peers:
            cases = [await _compute_case(peers[0], seed) for seed in range(_NUM_INPUTS)]
            before_s, before_bytes = await _probe(peers[0], cases[0]), server.pss_bytes()
            sizes = [before_bytes]
            watch = asyncio.create_task(_watch_memory(server, sizes))
            started_s = time.perf_counter()
            outcomes = await asyncio.gather(
                *(_live(peers[number % len(peers)], cases[number % len(cases)]) for number in range(count))
            )
            took_s = time.perf_counter() - started_s
            watch.cancel()
            after_s, after_bytes = await _probe(peers[0], cases[0]), server.pss_bytes()
            info = await peers[0].info()
    told = Counter(outcome.kind for outcome in outcomes)
    waits_s = [outcome.retry_after_s for outcome in outcomes if outcome.retry_after_s is not None]
    num_unknown = count - told["complete"] - told["refused"]
    most_bytes = max(sizes)
    growth = (most_bytes - before_bytes) / 2**20
    cache_bytes = CACHE_TOKENS * 12 * 2 * 4 * 128 * 4
    return [
        note("sessions", f"{count}, {num_fitting} fit; all over after {took_s:.1f} s"),
        at_least("complete", told["complete"], num_fitting),
        note("refused with a time to come again", f"{told['refused']}, {_range(waits_s)}"),
        note("of all, had to make room and began again", str(sum(outcome.num_lost for outcome in outcomes))),
        at_most("ended in another way", num_unknown, 0),
        *(note(f"{told[kind]} times", kind) for kind in told if kind not in ("complete", "refused")),
        at_most("largest relative error of a result", max(outcome.error for outcome in outcomes), MAX_RELATIVE_ERROR),
        note("memory before, at most, after", _mebibytes(before_bytes, most_bytes, after_bytes)),
        at_most("memory taken meanwhile", growth, cache_bytes / 2**20 + 256, " MiB"),
        note("lone step before and after", f"{1000 * before_s:.2f} and {1000 * after_s:.2f} ms"),
        at_most("lone step afterwards, times before", after_s / before_s, MAX_SLOWDOWN),
        at_most("sessions left open", info.num_sessions, 0),
        at_least("cache tokens left", info.cache_tokens_left, CACHE_TOKENS),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a session went."""

    kind: str
    error: float = 0.0
    """Largest relative difference to the result of a lone run."""
    retry_after_s: float | None = None
    num_lost: int = 0


async def _live(peer: Peer, case: Case) -> Outcome:
    """One client: a prompt and some tokens, each step within the deadline; begins again when its cache is lost."""
    num_lost = 0
    while True:
        try:
            session = await peer.open(max_length=MAX_LENGTH, deadline_s=DEADLINE_S)
            error = await _run(session, case)
            session.close()
            return Outcome(kind="complete", error=error, num_lost=num_lost)
        except CacheLostError:
            num_lost += 1
        except OverloadedError as refusal:
            if refusal.retry_after_s is None:
                return Outcome(kind=f"refused without a time: {refusal}", num_lost=num_lost)
            return Outcome(kind="refused", retry_after_s=refusal.retry_after_s, num_lost=num_lost)
        except Exception as error:
            return Outcome(kind=f"{type(error).__name__}: {error}", num_lost=num_lost)


async def _run(session: Session, case: Case) -> float:
    error = _difference(await session.step(case.prompt, timeout_s=6 * DEADLINE_S), case.outputs[0])
    for expected in case.outputs[1:]:
        await asyncio.sleep(PAUSE_S)
        error = max(error, _difference(await session.step(case.token, timeout_s=6 * DEADLINE_S), expected))
    return error


async def _compute_case(peer: Peer, seed: int) -> Case:
    prompt, token = states(PROMPT_TOKENS, WIDTH, torch.float32, seed), states(1, WIDTH, torch.float32, seed + 100)
    session = await peer.open(max_length=MAX_LENGTH)
    outputs = [await session.step(prompt)]
    outputs += [await session.step(token) for _ in range(NEW_TOKENS)]
    session.close()
    return Case(prompt=prompt, token=token, outputs=outputs)


async def _probe(peer: Peer, case: Case) -> float:
    """Median time of a lone session's step."""
    session = await peer.open(max_length=MAX_LENGTH)
    await session.step(case.prompt)
    times_s = []
    for _ in range(_PROBE_STEPS):
        started_s = time.perf_counter()
        await session.step(case.token, keep=PROMPT_TOKENS)
        times_s.append(time.perf_counter() - started_s)
    session.close()
    return statistics.median(times_s)


async def _watch_memory(server: Server, sizes: list[int]) -> None:
    while True:
        sizes.append(server.pss_bytes())
        await asyncio.sleep(0.25)


def _difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f} s" if values else "none"


def _mebibytes(*sizes: int) -> str:
    return ", ".join(f"{size / 2**20:.0f}" for size in sizes) + " MiB"
