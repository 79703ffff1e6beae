"""The short measurement at start of how many threads compute and how fast, remembered from one start to the next."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from petals_core.models.hashes import cache_folder, read_note, write_note
from petals_core.models.span import Span
from petals_server import threads

MAX_AGE_S: Final = 24 * 3600.0
"""A machine is not the same for ever: a measurement counts for a day."""


def measure(span: Span, *, fingerprint: str, num_threads: int | None, now_s: float | None = None) -> threads.ThreadPlan:
    """Measure, or read what was measured before on this device with the same blocks, dtype and software.

    To be called in the device's thread. ``now_s`` is Unix time; None: now.
    """
    now_s = time.time() if now_s is None else now_s
    note = _note(span, fingerprint=fingerprint, num_threads=num_threads)
    known = _read(note, now_s)
    if known is not None:
        torch.set_num_threads(known.bulk)  # as a measurement leaves it
        return known
    plan = threads.measure(span, num_threads=num_threads)
    write_note(note, {"measured_at_s": now_s, **asdict(plan)})
    return plan


def _read(note: Path, now_s: float) -> threads.ThreadPlan | None:
    values = read_note(note)
    measured_at_s = values.pop("measured_at_s", None)
    if not isinstance(measured_at_s, (int, float)) or not 0 <= now_s - measured_at_s <= MAX_AGE_S:
        return None
    decode, bulk = (values.get(name) for name in ("decode", "bulk"))
    rates = [values.get(name) for name in ("decode_tokens_per_s", "bulk_tokens_per_s")]
    decode_rate, bulk_rate = (rate if isinstance(rate, float) and 0 < rate < 1e12 else None for rate in rates)
    if not (isinstance(decode, int) and isinstance(bulk, int) and 0 < decode <= 1024 and 0 < bulk <= 1024):
        return None
    if decode_rate is None or bulk_rate is None:
        return None
    return threads.ThreadPlan(decode=decode, bulk=bulk, decode_tokens_per_s=decode_rate, bulk_tokens_per_s=bulk_rate)


def _note(span: Span, *, fingerprint: str, num_threads: int | None) -> Path:
    """Where a measurement is remembered: its name is all that the speed depends on."""
    conditions: dict[str, Any] = {
        "device": _device_name(span.device),
        "candidates": threads.candidates() if num_threads is None else [num_threads],
        "waiting": os.environ.get("OMP_WAIT_POLICY", ""),
        "fingerprint": fingerprint,
        "blocks": [span.start, span.end],
        "dtype": str(span.dtype),
        "quantization": span.quantization,
        "software": {name: version(name) for name in ("torch", "transformers", "petals-server")},
        "python": platform.python_version(),
    }
    name = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "throughput" / f"{name}.json"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.version.cuda}"
    return f"{device.type} {_processor_name()}"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
