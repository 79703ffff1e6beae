"""Many sessions that step token by token, beside the engine's own packed batch and an earlier revision."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engine_load.clients import Session, connected, states, step_rate
from engine_load.engine import engine_of
from engine_load.figures import Figure, at_least, at_most, note
from engine_load.servers import Server, checkout, serving

NUM_BLOCKS, WIDTH = 12, 1024
PROMPT_TOKENS = 64
MAX_LENGTH = 256
MIN_ENGINE_SHARE = 0.8
MIN_GAIN = {4: 1.6, 8: 2.3, 16: 3.4}
MAX_LATENCY_RATIO = 1.05
"""Of a lone session's step against the baseline; what differs by less can't be told apart on a busy machine."""
_GENERATE_TIMEOUT_S = 120.0
GENERATE = """
import json, sys, time, torch
from transformers.generation.streamers import BaseStreamer
from petals_client import AutoDistributedModelForCausalLM
folder, address, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
class Clock(BaseStreamer):
    times = []
    def put(self, value): self.times.append(time.time())
    def end(self): pass
model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[address], torch_dtype=torch.bfloat16)
prompt = torch.arange(3, 67).unsqueeze(0)
options = dict(attention_mask=torch.ones_like(prompt), do_sample=False)
model.generate(prompt, max_new_tokens=4, min_new_tokens=4, **options)
print("ready", flush=True)
sys.stdin.readline()
model.generate(prompt, max_new_tokens=count, min_new_tokens=count, streamer=Clock(), **options)
print(json.dumps(Clock.times), flush=True)
model.close()
"""


async def measure(
    folder: Path,
    numbers: Sequence[int],
    *,
    num_rounds: int,
    num_tokens: int,
    baseline: str | None,
    processes: Sequence[int],
) -> list[Figure]:
    """All figures of k independent sessions."""
    token = states(1, WIDTH, torch.bfloat16)
    figures: list[Figure] = []
    options = ("--torch-dtype", "bfloat16", "--attn-cache-tokens", "16384")
    with serving(folder, NUM_BLOCKS, *options) as server:
        figures += await _measure_sharing(folder, server, token, numbers, num_rounds, num_tokens)
        for count in processes:
            rate = await asyncio.to_thread(generate_together, folder, server.address, count, num_tokens)
            figures.append(note(f"{count} processes calling generate", f"{rate:.1f} tokens/s together"))
    if baseline is not None:
        figures += await _measure_latency(folder, token, baseline, options, num_rounds, num_tokens)
    return figures


async def _measure_sharing(
    folder: Path, server: Server, token: torch.Tensor, numbers: Sequence[int], num_rounds: int, num_tokens: int
) -> list[Figure]:
    """Sessions through the network and the engine's batch alone, in turns."""
    prompt = states(PROMPT_TOKENS, WIDTH, torch.bfloat16)
    most = max(numbers)
    served: dict[int, list[float]] = {count: [] for count in numbers}
    alone: dict[int, list[float]] = {count: [] for count in numbers}
    async with (
        engine_of(folder, torch_dtype="bfloat16", cache_tokens=16384) as engine,
        connected(server.address, most) as peers,
    ):
        sessions = [await peer.open(max_length=MAX_LENGTH) for peer in peers]
        own = engine.open(most, MAX_LENGTH)
        for session, state in zip(sessions, own, strict=True):
            await session.step(prompt)
            await engine.step(state, prompt, keep=0)
        for number in range(num_rounds + 1):
            for count in numbers:
                through = await step_rate(sessions[:count], token, prompt=PROMPT_TOKENS, count=num_tokens)
                batch = await engine.step_rate(own[:count], token, prompt=PROMPT_TOKENS, count=num_tokens)
                if number:  # the first round warms up
                    served[count].append(through)
                    alone[count].append(batch)
        engine.close(own)
    figures: list[Figure] = []
    one = statistics.median(served[1])
    for count in numbers:
        rate, batch = statistics.median(served[count]), statistics.median(alone[count])
        shares = [mine / theirs for mine, theirs in zip(served[count], alone[count], strict=True)]
        figures.append(note(f"{count} sessions", f"{rate:.1f} tokens/s; engine alone {batch:.1f}"))
        if count in MIN_GAIN:
            figures.append(
                at_least(f"{count} sessions, share of the engine", statistics.median(shares), MIN_ENGINE_SHARE)
            )
            gains = [many / single for many, single in zip(served[count], served[1], strict=True)]
            figures.append(at_least(f"{count} sessions, times one", statistics.median(gains), MIN_GAIN[count]))
    figures.append(note("a lone session's step", f"{1000 / one:.1f} ms"))
    return figures


async def _measure_latency(
    folder: Path, token: torch.Tensor, baseline: str, options: tuple[str, ...], num_rounds: int, num_tokens: int
) -> list[Figure]:
    """A lone session on this server and on that of another revision, in turns."""
    prompt = states(PROMPT_TOKENS, WIDTH, torch.bfloat16)
    times_s: dict[str, list[float]] = {"now": [], "before": []}
    with contextlib.ExitStack() as stack:
        tree = stack.enter_context(checkout(baseline))
        servers = {
            "now": stack.enter_context(serving(folder, NUM_BLOCKS, *options)),
            "before": stack.enter_context(serving(folder, NUM_BLOCKS, *options, source=tree)),
        }
        async with connected(servers["now"].address, 1) as now, connected(servers["before"].address, 1) as before:
            sessions: dict[str, Session] = {}
            for name, peers in (("now", now), ("before", before)):
                sessions[name] = await peers[0].open(max_length=MAX_LENGTH)
                await sessions[name].step(prompt)
            for number in range(num_rounds + 1):
                for name, session in sessions.items():
                    for step in range(num_tokens):
                        started_s = time.perf_counter()
                        await session.step(token, keep=PROMPT_TOKENS + step)
                        if number:
                            times_s[name].append(time.perf_counter() - started_s)
    medians = {name: statistics.median(values) for name, values in times_s.items()}
    return [
        note(f"lone step now and at {baseline}", f"{1000 * medians['now']:.2f} and {1000 * medians['before']:.2f} ms"),
        at_most(f"lone step, times that at {baseline}", medians["now"] / medians["before"], MAX_LATENCY_RATIO),
    ]


def generate_together(folder: Path, address: str, count: int, num_tokens: int) -> float:
    """Tokens per second of client processes that call ``generate`` at once, all of them together."""
    command = [sys.executable, "-c", GENERATE, str(folder), address, str(num_tokens)]
    with tempfile.TemporaryFile("w+") as errors:
        clients = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            for _ in range(count)
        ]
        try:
            for client in clients:
                _wait_until_ready(client)
            for client in clients:
                assert client.stdin is not None
                client.stdin.write("\n")
                client.stdin.flush()
            printed = [client.communicate(timeout=_GENERATE_TIMEOUT_S)[0] for client in clients]
        except (OSError, subprocess.TimeoutExpired) as error:
            errors.seek(0)
            raise RuntimeError(f"clients did not generate ({error}): {errors.read()[-1000:]}") from None
        finally:
            for client in clients:
                client.kill()
                client.wait()
    times: list[list[float]] = [json.loads(lines) for lines in printed]
    # While all of them decode: from the last first token to the first last one.
    start_s, end_s = max(each[1] for each in times), min(each[-1] for each in times)
    tokens = sum(start_s < each <= end_s for client_times in times for each in client_times)
    return tokens / (end_s - start_s)


def _wait_until_ready(client: subprocess.Popen[str]) -> None:
    assert client.stdout is not None
    ready, _, _ = select.select([client.stdout], [], [], _GENERATE_TIMEOUT_S)
    if not ready or client.stdout.readline().strip() != "ready":
        raise OSError("one was not ready in time")
