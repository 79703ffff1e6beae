"""Whether decode steps are replayed from what was recorded: what the user says, or what is faster here."""

from __future__ import annotations

import logging
import math
import statistics
import time
from typing import Final

import numpy as np
import torch

from petals_core.errors import first_line
from petals_core.models.span import Span
from petals_server.cache.pages import CachePages
from petals_server.execution.changes import RowChange
from petals_server.execution.steps import StepRunner
from petals_server.scheduling.plan import RowPart
from petals_server.scheduling.request import Urgency

log = logging.getLogger(__name__)

MIN_GAIN: Final = 0.95
"""A graph takes memory: a step that is replayed from one has to take less than this part of an ordinary one's time."""
_MAX_LOSS: Final = 1.05
"""What a program, which takes none, may seem to lose: so much times differ by chance."""
_NUM_STEPS: Final = 12
_MIN_STEPS: Final = 3
_ENOUGH_S: Final = 0.5
"""Where steps take long there is little to gain, and fewer of them are timed."""
_TOLERANCE: Final = 0.05
"""Of the largest element: what bfloat16 allows two ways of computing a step."""


@torch.inference_mode()
def choose_replay(mode: str, runner: StepRunner, replaying: StepRunner, pages: CachePages) -> bool:
    """Whether to replay steps, by ``mode`` (``auto``, ``on``, ``off``) and by comparing two runners of one span."""
    if mode == "off" or not replaying.can_replay:
        if mode == "on":
            log.warning("--compile on: decode steps can't be recorded for this model and device")
        return False
    try:
        times, expected = time_steps(runner, pages, _NUM_STEPS, enough_s=_ENOUGH_S)
        replayed_times, actual = time_steps(replaying, pages, len(times))
    except RuntimeError as error:
        log.info("decode steps can't be recorded: %s", first_line(error))
        return False
    plain_s, replayed_s = (statistics.median(each[1:]) for each in (times, replayed_times))
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not replaying.can_replay or difference > _TOLERANCE:
        log.warning("recorded decode steps differ by %.3f or can't be recorded: not used", difference)
        return False
    limit = MIN_GAIN if runner.span.device.type == "cuda" else _MAX_LOSS
    is_chosen = mode == "on" or replayed_s < limit * plain_s
    log.info(
        "a decode step takes %.2f ms, replayed from a recording %.2f ms: %s",
        1e3 * plain_s,
        1e3 * replayed_s,
        "recordings are used" if is_chosen else "recordings are not used",
    )
    return is_chosen


def time_steps(
    runner: StepRunner, pages: CachePages, num_steps: int, *, enough_s: float = math.inf
) -> tuple[list[float], torch.Tensor]:
    """The times of a session's decode steps, and what the last one gave; fewer steps once they took ``enough_s``.

    The first one sets up what the others use.
    """
    runner.threads.apply(Urgency.DECODE)
    session = pages.open(1)
    states = _states(runner.span)
    change = RowChange(prompts=None, adapters=())
    times: list[float] = []
    try:
        session.grow([0], [num_steps])
        for past in range(num_steps):
            session.grow_window(0, past, 1)
            row = RowPart(row=0, start=0, count=1, past=past, runs=session.runs(0))
            started_s = time.perf_counter()
            output = runner.compute(states, np.array([past]), [row], [change]).float().cpu()
            times.append(time.perf_counter() - started_s)
            if len(times) >= _MIN_STEPS and sum(times) > enough_s:
                break
    finally:
        session.close()
    return times, output


def _states(span: Span) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, span.hidden_size, generator=generator).to(device=span.device, dtype=span.dtype)
