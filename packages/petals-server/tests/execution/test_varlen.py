"""The paths that only CUDA takes, with a kernel that says what ``varlen_attn`` would and graphs that just compute."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_core.testing.factories import make_checkpoint
from petals_server.cache.pages import CachePages, plan_groups
from petals_server.cache.tensors import CacheTensors, LayerKind
from petals_server.execution import decode_graphs, gathered
from petals_server.execution.batch import Batch, active
from petals_server.execution.probe import find_layout
from petals_server.execution.varlen import Kernel, PagedRows, check_kernel
from petals_server.scheduling.plan import RowPart


def reference_kernel(
    query_THD: torch.Tensor,  # noqa: N803
    keys_PLGD: torch.Tensor,  # noqa: N803
    values_PLGD: torch.Tensor,  # noqa: N803
    rows: PagedRows,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Row by row, from the tables alone."""
    outputs = []
    for row, length in enumerate(rows.lengths.tolist()):
        start, end = rows.starts_q[row : row + 2].tolist()
        assert rows.starts_k[row + 1] - rows.starts_k[row] == length <= rows.max_length
        assert end - start <= rows.max_new
        pages = rows.pages_RM[row, : -(-length // keys_PLGD.shape[1])].long()
        repeats = query_THD.shape[1] // keys_PLGD.shape[2]
        keys, values = (
            each[pages].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(repeats, 0)
            for each in (keys_PLGD, values_PLGD)
        )
        at = torch.arange(length - (end - start), length)[:, None]
        seen = torch.arange(length)[None] <= at
        if window is not None:
            seen &= torch.arange(length)[None] > at - window
        masked = values.masked_fill(~seen.any(0)[None, :, None], 0)  # what left the window is anybody's
        mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        keys = keys.masked_fill(~seen.any(0)[None, :, None], 0)
        output = functional.scaled_dot_product_attention(
            query_THD[start:end].transpose(0, 1)[None], keys[None], masked[None], attn_mask=mask, scale=scale
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def run_now(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """In the place of recording a graph."""
    return compute


def test_the_check_of_kernels_finds_a_wrong_one() -> None:
    kind = LayerKind(num_heads=2, key_size=8, value_size=8, window=None)
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "page_tokens": 8}
    assert check_kernel(reference_kernel, kind, **options) < 1e-5

    def forgets_windows(*args: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        return reference_kernel(*args, scale=scale, window=None)  # type: ignore[arg-type]

    assert check_kernel(forgets_windows, kind, **options) > 0.1


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kernel", [reference_kernel, gathered.attend])
def test_paged_rows_and_graphs_give_what_rows_alone_give(family: str, kernel: Kernel, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, num_blocks=2)
    span = load_span(Checkpoint.open(tmp_path), 0, 2)
    layout = find_layout(span)
    pages = CachePages(
        plan_groups([kind.window for kind in layout.kinds], num_tokens=400, page_tokens=4), page_tokens=4
    )
    cache = CacheTensors(layout.kinds, pages, dtype=torch.float32, device=torch.device("cpu"))
    graphs = decode_graphs.DecodeGraphs(span, cache, first_layer=0, kernel=kernel, record=run_now)
    for pool in (*cache.keys_SGD, *cache.values_SGD):
        pool.fill_(float("nan"))  # what others left there
    lengths = [9, 3, 90]
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(length + 3, 64, generator=generator) for length in lengths]
    tables = [pages.open(1) for _ in lengths]

    def rows_of(pasts: list[int], counts: list[int]) -> list[RowPart]:
        rows = []
        for table, past, count in zip(tables, pasts, counts, strict=True):
            table.grow([past], [count])
            assert table.grow_window(0, past, count) is not None
            rows.append(RowPart(row=0, start=0, count=count, past=past, runs=table.runs(0)))
        return rows

    with torch.inference_mode():
        rows = rows_of([0, 0, 0], lengths)
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None]
        hidden = torch.cat([each[:length] for each, length in zip(states, lengths, strict=True)])
        with active(Batch(rows, cache, first_layer=0, kernel=reference_kernel)):
            first = span.forward_packed(hidden[None], positions, attention="petals_packed")[0].split(lengths)
        outputs = [[each] for each in first]
        for step in range(3):
            pasts = [length + step for length in lengths]
            for table, past in zip(tables, pasts, strict=True):
                table.slide(0, past)
            rows = rows_of(pasts, [1, 1, 1])
            assert graphs.fits(rows)
            hidden = torch.cat([each[past : past + 1] for each, past in zip(states, pasts, strict=True)])
            for output, row in zip(outputs, graphs.run(hidden, np.array(pasts), rows).clone(), strict=True):
                output.append(row[None])
        for output, each in zip(outputs, states, strict=True):
            expected = span(each[None])[0]
            assert (torch.cat(output) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert not graphs.fits([RowPart(row=0, start=0, count=2, past=0, runs=())])
    for table in tables:
        table.close()
    assert pages.num_held == 0
