"""Client processes killed in the middle of a step: what they held has to be free within seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine_load.clients import Peer, connected, states
from engine_load.figures import Figure, at_least, at_most, note
from engine_load.servers import Server, serving
from environment import ROOT

NUM_BLOCKS, WIDTH = 12, 1024
NUM_PROCESSES, CLIENTS_PER_PROCESS = 5, 10
CACHE_TOKENS = 32_768
MAX_S = 5.0
PROMPT_TOKENS, MAX_LENGTH = 128, 512
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Of an event loop's own pool at most; they are started as they are needed and then kept."""


async def measure(folder: Path) -> list[Figure]:
    """Kill 50 clients in a few processes, with SIGKILL and each in the middle of a step."""
    with serving(folder, NUM_BLOCKS, "--attn-cache-tokens", str(CACHE_TOKENS)) as server:
        async with connected(server.address, 1) as (peer,):
            session = await peer.open(max_length=MAX_LENGTH)
            # As those that will be killed: pools of threads are made when they are first needed, and stay.
            await session.step(states(PROMPT_TOKENS, WIDTH, torch.float32))
            expected = await session.step(states(4, WIDTH, torch.float32), keep=0)
            before, threads_before = await _held(peer, server), server.num_threads()
            processes = [_start_clients(server) for _ in range(NUM_PROCESSES)]
            try:
                for process in processes:
                    assert process.stdout is not None
                    line = await asyncio.to_thread(process.stdout.readline)
                    assert line.strip() == "stepping", line
                during = await _held(peer, server)
                for process in processes:
                    process.send_signal(signal.SIGKILL)
                killed_s = time.monotonic()
                after = during
                while after != before and time.monotonic() < killed_s + 2 * MAX_S:
                    await asyncio.sleep(0.05)
                    after = await _held(peer, server)
                took_s = time.monotonic() - killed_s
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
            more_threads = server.num_threads() - threads_before
            same = torch.equal(await session.step(states(4, WIDTH, torch.float32), keep=0), expected)
    names = "sessions, cache tokens left, sockets"
    return [
        note(f"before: {names}", str(before)),
        note(f"with {NUM_PROCESSES * CLIENTS_PER_PROCESS} clients", str(during)),
        note("after they were killed", str(after)),
        at_least(
            "clients that were in the middle of a step", during[0] - before[0], NUM_PROCESSES * CLIENTS_PER_PROCESS
        ),
        at_most("until all is as before", took_s, MAX_S, " s"),
        at_most("what differs from before", float(after != before), 0),
        at_most("threads more than before: those of a pool that compresses, which stay", more_threads, POOL_THREADS),
        at_least("another session goes on with the same result", float(same), 1),
    ]


async def _held(peer: Peer, server: Server) -> tuple[int, int, int]:
    info = await peer.info()
    return info.num_sessions, info.cache_tokens_left, server.num_sockets()


def _start_clients(server: Server) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "bench_engine.py"), "clients", server.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


async def step_for_ever(address: str) -> None:
    """The clients of one process: one always has a step on its way. They say when all have sessions."""
    prompt = states(PROMPT_TOKENS, WIDTH, torch.float32)
    async with connected(address, CLIENTS_PER_PROCESS) as peers:
        sessions = [await peer.open(max_length=MAX_LENGTH) for peer in peers]
        await asyncio.gather(*(session.step(prompt) for session in sessions))
        print("stepping", flush=True)

        async def run(index: int) -> None:
            while True:
                await sessions[index].step(prompt, keep=PROMPT_TOKENS)

        await asyncio.gather(*map(run, range(len(sessions))))
