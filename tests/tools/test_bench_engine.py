"""What puts load on a server in ``tools/bench_engine.py``: its clients, the engine beside them, its figures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from engine_load.clients import connected, states, step_rate
from engine_load.engine import engine_of
from engine_load.figures import at_least, at_most, histogram
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_core.net.loop import run
from petals_server.testing import InProcessSwarm


def test_sessions_of_several_clients_get_their_own_results(
    checkpoints: Callable[[str], Path], shared_swarm: Callable[[str], InProcessSwarm]
) -> None:
    folder = checkpoints("llama")
    server = next(each for each in shared_swarm("llama").servers if each.span[0] == 0)
    prompts = [states(3 + seed, 64, torch.float32, seed) for seed in range(3)]
    token = states(1, 64, torch.float32, 9)
    results: list[torch.Tensor] = []

    async def load() -> float:
        async with connected(str(server.address), 3) as peers:
            sessions = [await peer.open(max_length=16) for peer in peers]
            for session, prompt in zip(sessions, prompts, strict=True):
                await session.step(prompt)
            rate = await step_rate(sessions, token, prompt=3, count=2)
            results.extend([await session.step(token, keep=3) for session in sessions])
            assert (await peers[0].info()).num_sessions >= 3
            return rate

    assert run(load()) > 0
    span = load_span(Checkpoint.open(folder), *server.span)
    for prompt, result in zip(prompts, results, strict=True):
        with torch.inference_mode():
            expected = span(torch.cat([prompt[:3], token])[None])[0, -1:]
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


def test_the_engine_alone_gives_its_pages_back(checkpoints: Callable[[str], Path]) -> None:
    async def load() -> tuple[float, int]:
        async with engine_of(checkpoints("llama"), torch_dtype="float32", cache_tokens=256) as engine:
            sessions = engine.open(2, 16)
            rate = await engine.step_rate(sessions, states(1, 64, torch.float32), prompt=0, count=3)
            engine.close(sessions)
            pages = engine._engine.pages
            assert pages is not None
            return rate, pages.num_held

    rate, num_held = run(load())
    assert rate > 0
    assert num_held == 0


def test_figures_say_whether_targets_are_met() -> None:
    assert [at_least("rate", value, 2.0).is_met for value in (1.9, 2.0)] == [False, True]
    assert [at_most("time", value, 2.0).is_met for value in (2.0, 2.1)] == [True, False]
    lines = histogram([1.0, 2.0, 2.0, 50.0], num_bins=4)
    assert sum(int(line.split("ms")[1].split()[0]) for line in lines) == 4


@pytest.mark.parametrize("value", [0.0, 3.0, 0.004])
def test_figures_are_readable(value: float) -> None:
    assert float(at_least("rate", value, 1.0).measured) == pytest.approx(value)
