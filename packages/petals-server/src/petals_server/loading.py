"""From a model's name to blocks on the device, with what else can only be said once they are there.

Everything here runs in the device's thread and may take long; importing it imports torch and Transformers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from petals_core.errors import ConfigurationError
from petals_core.models import transformers_quantization as quantizers
from petals_core.models.architecture import block_count, find_architecture
from petals_core.models.checkpoint import Checkpoint, resolve_dtype
from petals_core.models.devices import check_device
from petals_core.models.hashes import ProgressCallback
from petals_core.models.low_rank import Adapter
from petals_core.models.span import Span, load_span
from petals_server import memory, threads, throughput
from petals_server.adapters import load_adapters
from petals_server.cache.pages import CachePages, plan_groups
from petals_server.cache.tensors import CPU_PAGE_TOKENS, CUDA_PAGE_TOKENS, CacheTensors
from petals_server.config import ServerConfig
from petals_server.execution import attention, packing
from petals_server.execution.compilation import choose_replay
from petals_server.execution.probe import Form, find_layout
from petals_server.execution.steps import StepRunner
from petals_server.execution.varlen import Kernel, find_kernel
from petals_server.positions import find_max_positions

log = logging.getLogger(__name__)

_MAX_TURN_TOKENS: Final = {"cpu": 512}
_MAX_TURN_TOKENS_ELSEWHERE: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A model whose weights are not loaded yet."""

    checkpoint: Checkpoint
    fingerprint: str
    num_blocks: int
    block_bytes: int
    """Memory that the largest block takes once it is loaded."""
    device: torch.device
    dtype: torch.dtype
    quantization: str
    """What the weights will be once they are loaded: one of ``petals_core.announcement.QUANTIZATIONS``."""
    num_blocks_that_fit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A span that is ready to run."""

    name: str
    fingerprint: str
    num_blocks: int
    """Blocks of the whole model."""
    span: Span
    torch_dtype: str
    quantization: str
    form: Form
    """How sessions' tokens go through the span together."""
    pages: CachePages
    """Who holds what of the attention cache."""
    cache: CacheTensors | None
    """The cache itself; None where each session keeps its own."""
    kernel: Kernel | None
    """Attends for all rows of a turn at once; None: they take turns."""
    with_replay: bool
    """Whether decode steps are replayed from what was recorded of one."""
    runner: StepRunner | None
    """Computes turns of the whole span; it has recorded its first step. None where sessions do not share turns."""
    cache_tokens: int
    """Tokens that the attention caches of all sessions may hold together."""
    state_tokens: int
    """What a row takes of these beside its own tokens, for recurrent states."""
    threads: threads.ThreadPlan
    max_turn_tokens: int
    """Tokens, pads included, that are computed in one go."""
    max_scores: int
    """Pairs of a token and one that it attends to, that are computed in one go: they may all be in memory at once."""
    adapters: Mapping[str, Adapter]
    """By the names by which clients choose them."""
    max_positions: int | None
    """Position ids that the model can look up; None: any."""


def open_model(config: ServerConfig, progress: ProgressCallback | None = None) -> OpenedModel:
    """Find the model and see what of it this machine can hold; no weights yet.

    Raises:
        CheckpointError, UnsupportedModelError, DeviceError: as ``load_span``.
    """
    checkpoint = Checkpoint.open(
        config.model,
        revision=config.revision,
        token=config.token,
        cache_dir=config.cache_dir,
        max_disk_bytes=config.max_disk_bytes,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    architecture = find_architecture(checkpoint.config)
    device = _choose_device(config.device)
    dtype = resolve_dtype(config.torch_dtype, checkpoint)
    device = check_device(device, dtype)
    form = quantizers.plan(
        checkpoint.config,
        config.quantization,
        device=device,
        dtype=dtype,
        num_linear=sum(architecture.block_linear_parameters),
    )
    sizes = zip(architecture.block_parameters, architecture.block_linear_parameters, strict=True)
    block_bytes = max(form.block_bytes(total, linear, dtype) for total, linear in sizes)
    return OpenedModel(
        checkpoint=checkpoint,
        fingerprint=checkpoint.fingerprint,
        num_blocks=block_count(checkpoint.config),
        block_bytes=block_bytes,
        device=device,
        dtype=dtype,
        quantization=form.name,
        num_blocks_that_fit=memory.count_blocks_that_fit(block_bytes, memory.free_bytes(device)),
    )


def load_model(opened: OpenedModel, start: int, end: int, config: ServerConfig) -> ServedModel:
    """Load blocks ``start`` up to ``end`` and measure what they need.

    Raises:
        NotEnoughMemoryError: they do not fit.
        CheckpointError, DeviceError: as ``load_span``.
    """
    attention.prepare(opened.device)
    memory.check_fits(end - start, opened.block_bytes, memory.free_bytes(opened.device))
    started_s = time.monotonic()
    span = load_span(
        opened.checkpoint, start, end, dtype=opened.dtype, device=opened.device, quantization=config.quantization
    )
    log.info(
        "loaded blocks %d:%d of %s in %.1f s: %.0f MiB in %s on %s",
        start,
        end,
        opened.checkpoint.name,
        time.monotonic() - started_s,
        span.num_bytes / memory.MIB,
        opened.dtype,
        opened.device,
    )
    packing.install(span)
    if span.quantization != "none":
        log.info(
            "%.0f %% of the weights are in %s: results differ a little from those of the unquantized model",
            100 * span.quantized_share,
            span.quantization,
        )
        if span.quantization == "int8" and opened.device.type == "cpu":
            log.warning("int8 is slow on a CPU: nf4 takes less memory and time")
    adapters = load_adapters(span, config)
    plan = throughput.measure(span, fingerprint=opened.fingerprint, num_threads=config.num_threads)
    free = memory.free_bytes(opened.device)
    cache_cost = memory.measure_cache_cost(span)
    cache_tokens = config.cache_tokens or memory.choose_cache_tokens(cache_cost.token_bytes, free)
    layout = find_layout(span)
    page_tokens = CUDA_PAGE_TOKENS if opened.device.type == "cuda" else CPU_PAGE_TOKENS
    windows = [kind.window for kind in layout.kinds] or [None]
    pages = CachePages(plan_groups(windows, num_tokens=cache_tokens, page_tokens=page_tokens), page_tokens=page_tokens)
    cache = CacheTensors(layout.kinds, pages, dtype=opened.dtype, device=opened.device) if layout.kinds else None
    kernel, with_replay, runner = None, False, None
    if cache is not None and layout.form is Form.PACKED:
        kernel = find_kernel(layout.kinds, dtype=opened.dtype, device=opened.device, page_tokens=page_tokens)
        plain, replaying = (
            StepRunner(
                span, cache, first_layer=0, form=layout.form, threads=plan, kernel=kernel, with_replay=with_replay
            )
            for with_replay in (False, True)
        )
        with_replay = choose_replay(config.compile, plain, replaying, pages)
        runner = replaying if with_replay else plain
    return ServedModel(
        name=opened.checkpoint.name,
        fingerprint=opened.fingerprint,
        num_blocks=opened.num_blocks,
        span=span,
        torch_dtype=str(opened.dtype).removeprefix("torch."),
        quantization=span.quantization,
        form=layout.form,
        pages=pages,
        cache=cache,
        kernel=kernel,
        with_replay=with_replay,
        runner=runner,
        cache_tokens=cache_tokens,
        state_tokens=cache_cost.state_tokens,
        threads=plan,
        max_scores=memory.choose_max_scores(span, free),
        max_turn_tokens=_MAX_TURN_TOKENS.get(opened.device.type, _MAX_TURN_TOKENS_ELSEWHERE),
        adapters=adapters,
        max_positions=find_max_positions(span),
    )


def _choose_device(name: str) -> torch.device | str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type == "meta":  # which takes everything and computes nothing
        raise ConfigurationError(f"--device {name}: there is no such device; use auto, cpu or cuda")
    return device
