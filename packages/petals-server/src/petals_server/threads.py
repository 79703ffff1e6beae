"""How many threads compute. Measured, because cores that are shared or slow make more threads slower."""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Final

import psutil
import torch

from petals_core.models.span import Span
from petals_server.scheduling.request import Urgency

_NUM_ROUNDS: Final = 5
_MAX_MEASURING_S: Final = 1.0
_NUM_BULK_TOKENS: Final = 32
_MIN_GAIN: Final = 0.85
"""More threads have to bring a step below this part of its time: they also take cores from everybody else."""
_applied: int | None = None
"""What was set last, by whichever thread: torch asks OpenMP, which has one number for each thread, but MKL has one for
all of them."""


def candidates() -> list[int]:
    """Numbers of threads worth measuring: powers of two up to the physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
    numbers = [1]
    while numbers[-1] * 2 < most:
        numbers.append(numbers[-1] * 2)
    return numbers if most == 1 else [*numbers, most]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadPlan:
    """Threads for each kind of work. A decode step is bound by memory, a prefill by arithmetic, so they differ."""

    decode: int
    bulk: int
    decode_tokens_per_s: float
    """Measured speed of one session."""
    bulk_tokens_per_s: float
    """Measured speed with many tokens at once."""

    def apply(self, urgency: Urgency) -> None:
        """Let the calling thread compute with the number for this kind of work."""
        global _applied
        number = self.decode if urgency is Urgency.DECODE else self.bulk
        if number != _applied or number != torch.get_num_threads():
            torch.set_num_threads(number)
            _applied = number


@torch.inference_mode()
def measure(span: Span, *, num_threads: int | None = None) -> ThreadPlan:
    """Find the numbers of threads with which steps of one token and of many take least time.

    To be called in the device's thread. ``num_threads`` is used for both where it is given, and the speed is measured.
    """
    numbers = candidates() if num_threads is None else [num_threads]
    decode, decode_s = _choose(span, numbers, num_tokens=1)
    bulk, bulk_s = _choose(span, numbers, num_tokens=_NUM_BULK_TOKENS)
    return ThreadPlan(
        decode=decode, bulk=bulk, decode_tokens_per_s=1 / decode_s, bulk_tokens_per_s=_NUM_BULK_TOKENS / bulk_s
    )


def _choose(span: Span, numbers: list[int], *, num_tokens: int) -> tuple[int, float]:
    """The best of ``numbers``, and the seconds that a step of ``num_tokens`` takes with it.

    The candidates take turns and the least time of each counts, so that what else the machine does hurts all alike.
    """
    hidden_RTH = torch.zeros(1, num_tokens, span.hidden_size, dtype=span.dtype, device=span.device)
    best_s = dict.fromkeys(numbers, math.inf)
    give_up_s = time.perf_counter() + _MAX_MEASURING_S
    for _ in range(_NUM_ROUNDS):
        for number in numbers:
            torch.set_num_threads(number)
            best_s[number] = min(best_s[number], _measure_step_s(span, hidden_RTH))
        if time.perf_counter() > give_up_s:
            break
    chosen = numbers[0]
    for number in numbers:
        if best_s[number] < _MIN_GAIN * best_s[chosen]:
            chosen = number
    torch.set_num_threads(chosen)
    return chosen, best_s[chosen]


def _measure_step_s(span: Span, hidden_RTH: torch.Tensor) -> float:
    cache = span.new_cache()
    times = []
    for _ in range(2):  # The first one pays for the change of the number of threads.
        started_s = time.perf_counter()
        span(hidden_RTH, cache=cache)
        if span.device.type == "cuda":
            torch.cuda.synchronize(span.device)
        times.append(time.perf_counter() - started_s)
    return times[-1]
