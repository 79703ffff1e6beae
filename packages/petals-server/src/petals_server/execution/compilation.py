"""Whether decode steps are replayed from recorded graphs: what the user says, or what is faster here."""

from __future__ import annotations

import logging
import time
from typing import Final

import numpy as np
import torch

from petals_core.models.split import Span
from petals_server.cache.pages import CachePages
from petals_server.execution.changes import RowChange
from petals_server.execution.steps import StepRunner
from petals_server.scheduling.plan import RowPart

log = logging.getLogger(__name__)

MIN_GAIN: Final = 0.95
"""A replayed step has to take less than this part of the time of one that is launched kernel by kernel."""
_NUM_STEPS: Final = 12
_TOLERANCE: Final = 0.05
"""Of the largest element: what bfloat16 allows two ways of computing a step."""


@torch.inference_mode()
def choose_graphs(mode: str, runner: StepRunner, replaying: StepRunner, pages: CachePages) -> bool:
    """Whether to use graphs, by ``mode`` (``auto``, ``on``, ``off``) and by comparing two runners of the same span."""
    if mode == "off" or not replaying.has_graphs:
        if mode == "on":
            log.warning("--compile on: decode steps can't be recorded for this model and device")
        return False
    try:
        plain_s, expected = time_steps(runner, pages)
        replayed_s, actual = time_steps(replaying, pages)
    except RuntimeError as error:
        log.info("decode steps can't be recorded: %s", str(error).splitlines()[0])
        return False
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not replaying.has_graphs or difference > _TOLERANCE:
        log.warning("recorded decode steps differ by %.3f or can't be recorded: not used", difference)
        return False
    is_chosen = mode == "on" or replayed_s < MIN_GAIN * plain_s
    log.info(
        "a decode step takes %.2f ms, replayed from a graph %.2f ms: %s",
        1e3 * plain_s,
        1e3 * replayed_s,
        "graphs are used" if is_chosen else "graphs are not used",
    )
    return is_chosen


def time_steps(runner: StepRunner, pages: CachePages) -> tuple[float, torch.Tensor]:
    """The median time of a session's decode steps, and what the last one gave."""
    session = pages.open(1)
    states = _states(runner.span)
    change = RowChange(prompts=None, adapters=())
    times = []
    try:
        session.grow([0], [_NUM_STEPS])
        for past in range(_NUM_STEPS):
            session.grow_window(0, past, 1)
            row = RowPart(row=0, start=0, count=1, past=past, runs=session.runs(0))
            started_s = time.perf_counter()
            output = runner.compute(states, np.array([past]), [row], [change]).float().cpu()
            times.append(time.perf_counter() - started_s)
    finally:
        session.close()
    return float(np.median(times)), output


def _states(span: Span) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, span.hidden_size, generator=generator).to(device=span.device, dtype=span.dtype)
