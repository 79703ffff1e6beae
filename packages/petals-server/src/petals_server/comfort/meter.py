"""Measures what other processes take of the device."""

from __future__ import annotations

import asyncio
import logging
import os

import psutil

from petals_server.comfort.busyness import parse_gpu_use

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0


class CpuMeter:
    """The share of all cores that other processes take, since the last measurement."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._last = self._read()

    async def measure(self) -> float:
        """The share since the last call, 0 to 1."""
        busy_s, own_s, total_s = self._read()
        last_busy_s, last_own_s, last_total_s = self._last
        self._last = busy_s, own_s, total_s
        passed_s = total_s - last_total_s
        if passed_s <= 0:
            return 0.0
        return min(1.0, max(0.0, (busy_s - last_busy_s - (own_s - last_own_s)) / passed_s))

    def _read(self) -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), self._process.cpu_times()
        total_s = sum(times)
        return total_s - times.idle - getattr(times, "iowait", 0.0), own.user + own.system, total_s


class GpuMeter:
    """The share of one NVIDIA GPU that other processes take, as its driver tells."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._has_warned = False

    async def measure(self) -> float:
        """The share now, 0 to 1; 0 where the driver's tool does not answer."""
        try:
            process = await asyncio.create_subprocess_exec(
                *("nvidia-smi", "pmon", "-c", "1", "-s", "u", "-i", str(self._index)),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            self._warn(f"nvidia-smi can't be run: {error.strerror or error}")
            return 0.0
        try:
            output, _ = await asyncio.wait_for(process.communicate(), _TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            self._warn("nvidia-smi does not answer")
            return 0.0
        if process.returncode:
            self._warn(f"nvidia-smi ends with exit code {process.returncode}")
        return parse_gpu_use(output.decode(errors="replace"), {os.getpid()})

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("--pause-when-busy has no effect, since %s", reason)


def make_meter(device: str) -> CpuMeter | GpuMeter:
    """The meter of a torch device: ``cpu``, ``cuda``, ``cuda:1``."""
    if not device.startswith("cuda"):
        return CpuMeter()
    _, _, index = device.partition(":")
    return GpuMeter(int(index or 0))
