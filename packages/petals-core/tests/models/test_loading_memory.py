"""How much memory a process takes at most while it loads, told by Linux."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.memory import release_memory
from petals_core.models.span import Span, load_span
from petals_core.testing.factories import make_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure_peak(load: Callable[[], Span]) -> tuple[Span, int]:
    """The span, and by how much the process grew at most while it was loaded."""
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS")
    span = load()
    return span, status_bytes("VmHWM") - before


def only_files_of(folder: Path, start: int, end: int) -> Checkpoint:
    """A checkpoint whose files without tensors of these blocks are gone."""
    checkpoint = Checkpoint.open(folder)
    blocks = tuple(f".layers.{index}." for index in range(start, end))
    wanted = checkpoint.tensor_files(name for name in checkpoint.tensor_names if any(block in name for block in blocks))
    assert len(wanted) < len(checkpoint.files) / 2
    for file in checkpoint.files:
        if file not in wanted:
            (folder / file).unlink()
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mixtral", {"num_local_experts": 8, "intermediate_size": 512}),
        ("qwen3_moe", {"num_experts": 16, "moe_intermediate_size": 256}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_many_files_are_loaded_with_a_fifth_more_than_they_take(
    family: str, sizes: dict[str, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_checkpoint(
        tmp_path, family, num_blocks=6, hidden_size=256, dtype=dtype, max_shard_size=3_000_000, **sizes
    )
    checkpoint = only_files_of(folder, 2, 4)
    load_span(Checkpoint.open(make_checkpoint(tmp_path / "small", family)), 0, 1)  # imports, caches
    span, peak = measure_peak(lambda: load_span(checkpoint, 2, 4))
    assert span.num_bytes > 12_000_000
    assert peak < 1.2 * span.num_bytes
    assert peak > 0.8 * span.num_bytes  # the measure is one


def test_the_whole_span_is_never_there_unquantized(tmp_path: Path) -> None:
    """In a process of its own, where nothing else takes or gives back memory meanwhile."""
    folder = make_checkpoint(tmp_path, num_blocks=9, hidden_size=512, max_shard_size=5_000_000)
    for quantization in ("none", "nf4"):
        make_checkpoint(tmp_path / quantization)
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    plain_bytes, plain_peak, quantized_bytes, quantized_peak = map(
        int, subprocess.check_output(command, text=True, timeout=120).split()
    )
    assert 0.8 * plain_bytes < plain_peak < 1.2 * plain_bytes
    assert quantized_peak < 0.5 * plain_bytes
    assert quantized_bytes < 0.16 * plain_bytes


def print_peaks(folder: Path) -> None:
    """Size and peak of a span as it is stored, then of the same in nf4; before that, both are loaded once, small."""
    for quantization in ("none", "nf4"):
        load_span(Checkpoint.open(folder / quantization), 0, 1, quantization=quantization)
    plain, plain_peak = measure_peak(lambda: load_span(Checkpoint.open(folder), 0, 9))
    quantized, quantized_peak = measure_peak(lambda: load_span(Checkpoint.open(folder), 0, 9, quantization="nf4"))
    print(plain.num_bytes, plain_peak, quantized.num_bytes, quantized_peak)


if __name__ == "__main__":
    print_peaks(Path(sys.argv[1]))
