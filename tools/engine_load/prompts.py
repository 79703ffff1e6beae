"""A long prompt that arrives while others decode: what it costs them, and how much longer it takes itself."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import torch

from engine_load.clients import Session, connected, states
from engine_load.figures import Figure, at_most, histogram, note
from engine_load.servers import serving
from engine_load.sharing import MAX_LENGTH, NUM_BLOCKS, PROMPT_TOKENS, WIDTH

NUM_DECODING = 8
NUM_PROMPT_TOKENS = 4096
MAX_SLOWDOWN = 2.5
_BEFORE_S = 8.0


async def measure(folder: Path) -> tuple[list[Figure], list[str]]:
    """Figures, and lines with the histograms of step times."""
    token, prompt = states(1, WIDTH, torch.bfloat16), states(PROMPT_TOKENS, WIDTH, torch.bfloat16)
    long_prompt = states(NUM_PROMPT_TOKENS, WIDTH, torch.bfloat16, seed=1)
    steps: list[tuple[float, float]] = []
    """When each step began and ended."""
    with serving(folder, NUM_BLOCKS, "--torch-dtype", "bfloat16", "--attn-cache-tokens", "16384") as server:
        async with connected(server.address, NUM_DECODING + 1) as peers:
            alone_s = [
                await _run_prompt(await peers[-1].open(max_length=NUM_PROMPT_TOKENS), long_prompt) for _ in range(2)
            ]
            sessions = [await peer.open(max_length=MAX_LENGTH) for peer in peers[:NUM_DECODING]]
            for session in sessions:
                await session.step(prompt)
            is_over = asyncio.Event()

            async def decode(session: Session) -> None:
                number = 0
                while not is_over.is_set():
                    started_s = time.perf_counter()
                    await session.step(token, keep=PROMPT_TOKENS + number % (MAX_LENGTH - PROMPT_TOKENS))
                    steps.append((started_s, time.perf_counter()))
                    number += 1

            async with asyncio.TaskGroup() as tasks:
                for session in sessions:
                    tasks.create_task(decode(session))
                await asyncio.sleep(_BEFORE_S)
                arrived_s = time.perf_counter()
                beside_s = await _run_prompt(await peers[-1].open(max_length=NUM_PROMPT_TOKENS), long_prompt)
                is_over.set()
    warm_s = arrived_s - 0.75 * _BEFORE_S
    before = [1000 * (end - start) for start, end in steps if start >= warm_s and end < arrived_s]
    during = [1000 * (end - start) for start, end in steps if start >= arrived_s and end < arrived_s + beside_s]
    medians = statistics.median(before), statistics.median(during)
    lines = [
        f"steps of {NUM_DECODING} sessions before the prompt ({len(before)}):",
        *histogram(before),
        f"and while it is computed ({len(during)}):",
        *histogram(during),
    ]
    figures = [
        note("step before the prompt, median", f"{medians[0]:.1f} ms"),
        note("step while it is computed, median", f"{medians[1]:.1f} ms"),
        at_most("steps are slower by", medians[1] / medians[0], MAX_SLOWDOWN, " times"),
        note(f"prompt of {NUM_PROMPT_TOKENS} tokens alone", f"{min(alone_s):.2f} s"),
        note(f"beside {NUM_DECODING} sessions", f"{beside_s:.2f} s, {beside_s / min(alone_s):.1f} times as long"),
    ]
    return figures, lines


async def _run_prompt(session: Session, prompt: torch.Tensor) -> float:
    started_s = time.perf_counter()
    await session.step(prompt)
    session.close()
    return time.perf_counter() - started_s
