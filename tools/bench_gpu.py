"""What the engine's device part does on a GPU: ``python3 tools/bench_gpu.py [--device cpu] [--json FILE]``.

Sessions of different lengths go through a span as the engine computes them, prompts in chunks and then single tokens,
and are compared with the same blocks run by Transformers for each session alone: in float32, and in bfloat16 with and
without the paged kernel. Then decode steps of 1, 4 and 16 sessions are timed, launched kernel by kernel and replayed
from graphs, and a prompt. No server and no network is involved; with ``--device cpu --tiny`` it runs anywhere.

It needs the packages that ``petals-server`` needs, installed or not: where ``petals_server`` is not installed, the
sources beside this file are used.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

try:
    import petals_server  # noqa: F401 - only to see whether it is there
except ModuleNotFoundError:
    for _package in ("petals-core", "petals-dht", "petals-server"):
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "packages" / _package / "src"))

import numpy as np
import torch

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_core.testing.factories import bench_model, make_checkpoint
from petals_server.cache.pages import CachePages, plan_groups
from petals_server.cache.tensors import CPU_PAGE_TOKENS, CUDA_PAGE_TOKENS, CacheTensors
from petals_server.execution import attention
from petals_server.execution.changes import RowChange
from petals_server.execution.probe import find_layout
from petals_server.execution.steps import StepRunner
from petals_server.execution.varlen import find_kernel
from petals_server.scheduling.plan import RowPart
from petals_server.threads import ThreadPlan

SESSIONS: Final = (1, 4, 16)
PROMPT_TOKENS: Final = 4096
WARM_UP_STEPS: Final = 20
NO_CHANGE: Final = RowChange(prompts=None, adapters=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One figure."""

    model: str
    dtype: str
    figure: str
    value: str


class Sessions:
    """Sessions of one row on a runner, with pages but without a scheduler."""

    def __init__(self, runner: StepRunner, pages: CachePages, num_sessions: int) -> None:
        self.runner = runner
        self.tables = [pages.open(1) for _ in range(num_sessions)]
        self.lengths = [0] * num_sessions

    @torch.inference_mode()
    def step(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Append tokens [N, H] to each session in one turn; sessions may get none."""
        rows, positions = [], []
        for table, length, new in zip(self.tables, self.lengths, states, strict=True):
            count = new.shape[0]
            if count:
                table.grow([length], [count])
                table.grow_window(0, length, count)
                rows.append(RowPart(row=0, start=0, count=count, past=length, runs=table.runs(0)))
                positions.append(np.arange(length, length + count))
        output = self.runner.compute(torch.cat(states), np.concatenate(positions), rows, [NO_CHANGE] * len(rows))
        outputs = list(output.clone().split([new.shape[0] for new in states]))
        for index, new in enumerate(states):
            self.lengths[index] += new.shape[0]
            self.tables[index].slide(0, self.lengths[index])
        return outputs

    def close(self) -> None:
        for table in self.tables:
            table.close()


class Bench:
    """One model in one dtype on the device."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.name = name
        self.dtype = str(dtype).removeprefix("torch.")
        self.device = device
        attention.prepare(device)
        checkpoint = Checkpoint.open(folder)
        self.span: Span = load_span(checkpoint, 0, int(checkpoint.config.num_hidden_layers), dtype=dtype, device=device)
        self.layout = find_layout(self.span)
        page_tokens = CUDA_PAGE_TOKENS if device.type == "cuda" else CPU_PAGE_TOKENS
        groups = plan_groups([kind.window for kind in self.layout.kinds], num_tokens=24 * 1024, page_tokens=page_tokens)
        self.pages = CachePages(groups, page_tokens=page_tokens)
        self.cache = CacheTensors(self.layout.kinds, self.pages, dtype=dtype, device=device)
        self.kernel = find_kernel(self.layout.kinds, dtype=dtype, device=device, page_tokens=page_tokens)

    def runner(self, *, with_kernel: bool, with_replay: bool = False) -> StepRunner:
        threads = ThreadPlan(
            decode=torch.get_num_threads(), bulk=torch.get_num_threads(), decode_tokens_per_s=1, bulk_tokens_per_s=1
        )
        return StepRunner(
            self.span,
            self.cache,
            first_layer=0,
            form=self.layout.form,
            threads=threads,
            kernel=self.kernel if with_kernel else None,
            with_replay=with_replay,
        )

    def states(self, num_tokens: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(num_tokens, self.span.hidden_size, generator=generator)
        return states.to(device=self.device, dtype=self.span.dtype)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def error(self, runner: StepRunner, num_decode: int = 8) -> float:
        """The largest difference from sessions alone, relative to the largest element of the right result.

        Four sessions of 5 to 700 tokens begin in chunks of up to 256 in the same turns and then decode together.
        """
        lengths = [5, 300, 700, 64]
        states = [self.states(length + num_decode, seed) for seed, length in enumerate(lengths)]
        sessions = Sessions(runner, self.pages, len(lengths))
        parts: list[list[torch.Tensor]] = [[] for _ in lengths]
        try:
            while any(done < length for done, length in zip(sessions.lengths, lengths, strict=True)):
                chunks = [
                    each[done : min(done + 256, length)]
                    for each, done, length in zip(states, sessions.lengths, lengths, strict=True)
                ]
                for part, output in zip(parts, sessions.step(chunks), strict=True):
                    part.append(output)
            for _ in range(num_decode):
                steps = [each[done : done + 1] for each, done in zip(states, sessions.lengths, strict=True)]
                for part, output in zip(parts, sessions.step(steps), strict=True):
                    part.append(output)
        finally:
            sessions.close()
        worst = 0.0
        for part, each in zip(parts, states, strict=True):
            expected = self.span(each[None])[0].float()
            difference = float((torch.cat(part).float() - expected).abs().max() / expected.abs().max())
            if math.isnan(difference):
                raise ArithmeticError("not a number came out, here or alone")
            worst = max(worst, difference)
        return worst

    def decode_rate(self, runner: StepRunner, num_sessions: int, num_steps: int, past: int = 512) -> float:
        """Tokens per second of sessions that decode in one turn each, behind ``past`` tokens."""
        sessions = Sessions(runner, self.pages, num_sessions)
        try:
            sessions.step([self.states(past, seed) for seed in range(num_sessions)])
            step = [self.states(1, seed) for seed in range(num_sessions)]
            times = []
            for number in range(num_steps + WARM_UP_STEPS):
                self.synchronize()
                started_s = time.perf_counter()
                sessions.step(step)[0].float().cpu()
                self.synchronize()
                if number >= WARM_UP_STEPS:
                    times.append(time.perf_counter() - started_s)
        finally:
            sessions.close()
        return num_sessions / statistics.median(times)

    def prefill_rate(self, runner: StepRunner, num_tokens: int, chunk: int) -> float:
        """Tokens per second of a prompt in chunks; the better of two runs."""
        states = self.states(num_tokens)
        best_s = float("inf")
        for _ in range(2):
            sessions = Sessions(runner, self.pages, 1)
            try:
                self.synchronize()
                started_s = time.perf_counter()
                for part in states.split(chunk):
                    sessions.step([part])
                self.synchronize()
                best_s = min(best_s, time.perf_counter() - started_s)
            finally:
                sessions.close()
        return num_tokens / best_s


def measure(lines: list[Line], bench: Bench, *, num_steps: int, prompt_tokens: int) -> None:
    """All figures of one model in one dtype; a part that fails is a line of its own."""

    def note(figure: str, value: str) -> None:
        lines.append(Line(model=bench.name, dtype=bench.dtype, figure=figure, value=value))
        print(f"{bench.name:8} {bench.dtype:9} {figure:48} {value}", flush=True)

    def attempt(figure: str, action: Any) -> None:
        try:
            note(figure, action())
        except Exception as error:
            logging.exception("%s failed", figure)
            note(figure, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")

    note("form of batches", bench.layout.form.value)
    note("paged kernel", "varlen_attn" if bench.kernel is not None else "none")
    by_rows = bench.runner(with_kernel=False)
    attempt("largest difference from alone, row by row", lambda: f"{bench.error(by_rows):.2e}")
    runners = {"row by row": by_rows}
    if bench.kernel is not None:
        paged = runners["paged kernel"] = bench.runner(with_kernel=True)
        attempt("largest difference from alone, paged kernel", lambda: f"{bench.error(paged):.2e}")
    replayed = bench.runner(with_kernel=True, with_replay=True)
    if replayed.can_replay:
        attempt("largest difference from alone, graphs", lambda: f"{bench.error(replayed):.2e}")
        note("graphs were recorded", "yes" if replayed.can_replay else "no")
        if replayed.can_replay:
            runners["graphs"] = replayed
    for way, runner in runners.items():
        for count in SESSIONS:
            attempt(
                f"decode, {count} sessions, {way}, tokens/s",
                lambda runner=runner, count=count: f"{bench.decode_rate(runner, count, num_steps):,.0f}",
            )
        if way != "graphs":
            attempt(
                f"prompt of {prompt_tokens} in chunks of 1024, {way}, tokens/s",
                lambda runner=runner: f"{bench.prefill_rate(runner, prompt_tokens, 1024):,.0f}",
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that everything runs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    lines: list[Line] = []
    num_steps, prompt_tokens = (8, 256) if options.tiny else (50, PROMPT_TOKENS)
    with tempfile.TemporaryDirectory(prefix="petals-gpu-") as temporary:

        def run(model: str, folder: Path, *dtypes: torch.dtype) -> None:
            for dtype in dtypes:
                started_s = time.perf_counter()
                try:
                    bench = Bench(model, folder, dtype, device)
                    measure(lines, bench, num_steps=num_steps, prompt_tokens=prompt_tokens)
                except Exception as error:
                    logging.exception("%s in %s failed", model, dtype)
                    lines.append(Line(model=model, dtype=str(dtype), figure="all", value=f"failed: {error}"))
                print(f"({time.perf_counter() - started_s:.0f} s)", flush=True)
                if device.type == "cuda":
                    torch.cuda.empty_cache()

        windows = make_checkpoint(Path(temporary, "mistral"), "mistral", num_attention_heads=4, head_dim=64)
        run("mistral", windows, torch.float32, torch.bfloat16)
        sinks = make_checkpoint(Path(temporary, "gpt_oss"), "gpt_oss")
        run("gpt_oss", sinks, torch.float32, torch.bfloat16)
        if options.tiny:
            run("llama", make_checkpoint(Path(temporary, "llama"), "llama"), torch.float32, torch.bfloat16)
        else:
            run("bench", bench_model(Path(temporary, "bench")), torch.float32, torch.bfloat16)
            wide = make_checkpoint(
                Path(temporary, "wide"),
                "llama",
                num_blocks=6,
                hidden_size=4096,
                dtype=torch.bfloat16,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                intermediate_size=14336,
                max_position_embeddings=8192,
            )
            run("wide", wide, torch.bfloat16)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1))
    return 1 if any(line.value.startswith("failed") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
