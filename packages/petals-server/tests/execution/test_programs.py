"""Recorded programs: what they compute, and what can't be recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import fx

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_core.testing.factories import make_checkpoint
from petals_server.cache.pages import CachePages, PageRun, SessionPages, plan_groups
from petals_server.cache.tensors import CacheTensors
from petals_server.execution import attention
from petals_server.execution.batch import Batch, active
from petals_server.execution.linear import Linear
from petals_server.execution.packing import Packing
from petals_server.execution.probe import Form, find_layout
from petals_server.execution.programs import RecordingError, StepPrograms
from petals_server.execution.rewriting import RULES, Rewriter, Rule
from petals_server.scheduling.plan import RowPart


class Bench:
    """A span of two blocks, a cache and one row in it."""

    def __init__(
        self,
        folder: Path,
        family: str,
        *,
        width: int = 64,
        dtype: torch.dtype = torch.float32,
        rules: Sequence[Rule] = RULES,
        is_packed: bool | None = None,
    ) -> None:
        """``is_packed``: the weights, of layers that oneDNN multiplies; None: torch's own layers."""
        self.width = width
        make_checkpoint(folder, family, num_blocks=2, hidden_size=width)
        self.span = load_span(Checkpoint.open(folder), 0, 2, dtype=dtype)
        layout = find_layout(self.span)
        assert layout.form is Form.PACKED
        windows = [kind.window for kind in layout.kinds]
        pages = CachePages(plan_groups(windows, num_tokens=400, page_tokens=4), page_tokens=4)
        self.cache = CacheTensors(layout.kinds, pages, dtype=dtype, device=torch.device("cpu"))
        self.table: SessionPages = pages.open(1)
        self.table.grow([0], [120])
        self.table.grow_window(0, 0, 120)
        if is_packed is not None:
            for layer in self.span.blocks.modules():
                if type(layer) is torch.nn.Linear:
                    layer.__class__ = Linear
        if is_packed:
            self.packing = Packing([layer for layer in self.span.blocks.modules() if isinstance(layer, Linear)])
        self.programs = StepPrograms(self.span, rules=rules)
        self.generator = torch.Generator().manual_seed(0)

    def batch(self, past: int, count: int) -> Batch:
        row = RowPart(row=0, start=0, count=count, past=past, runs=self.table.runs(0))
        return Batch([row], self.cache, first_layer=0)

    def kept_bits(self) -> list[torch.Tensor]:
        """All keys as whole numbers: slots that nobody has written to may hold what is equal to nothing."""
        return [each.clone().view(torch.int32) for each in self.cache.keys_SGD]

    def states(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.width, generator=self.generator).to(self.span.dtype)

    @torch.inference_mode()
    def plain(self, hidden: torch.Tensor, past: int) -> torch.Tensor:
        positions = torch.arange(past, past + len(hidden))[None]
        with active(self.batch(past, len(hidden))):
            return self.span.forward_packed(hidden[None], positions, attention=attention.NAME)[0]

    @torch.inference_mode()
    def replayed(self, hidden: torch.Tensor, past: int) -> torch.Tensor:
        batch = self.batch(past, len(hidden))
        if len(hidden) == 1 and (output := self.programs.run_lone(hidden, past, batch.rows[0])) is not None:
            return output
        return self.programs.run(hidden, torch.arange(past, past + len(hidden)), batch)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_oss", "phi3", "gpt2", "mixtral", "deepseek_v3"]
)
def test_programs_compute_what_the_model_computes(family: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, family)
    bench.plain(bench.states(20), 0)
    past = 20
    for count in (1, 1, 3, 1, 8, 3, 1):
        hidden = bench.states(count)
        assert torch.equal(bench.replayed(hidden, past), bench.plain(hidden, past))
        past += count
    assert bench.programs.is_traced


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_programs_in_bfloat16_compute_what_the_model_computes(family: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, family, dtype=torch.bfloat16)
    bench.plain(bench.states(20), 0)
    for past, count in ((20, 1), (21, 3), (24, 1)):
        hidden = bench.states(count)
        assert torch.equal(bench.replayed(hidden, past), bench.plain(hidden, past))


def gelu_for_silu(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Another result."""
    if node.target is not torch._C._nn.silu:
        return None
    return rewriter.call(torch._C._nn.gelu, *node.args, form=node.meta["form"])


def cosines_for_sines(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Other keys: a first token attends to itself alone, so that nothing else changes."""
    if node.target is not torch.sin:
        return None
    return rewriter.call(torch.cos, *node.args, form=node.meta["form"])


def broken(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    raise ValueError("something unforeseen")


@pytest.mark.parametrize("rule", [gelu_for_silu, cosines_for_sines, broken])
def test_a_rule_that_changes_results_or_fails_is_not_used(rule: Rule, tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", rules=[rule])
    for past in (0, 1, 2, 3):
        hidden = bench.states(1)
        output = bench.replayed(hidden, past)
        kept = bench.kept_bits()
        assert torch.equal(output, bench.plain(hidden, past))
        assert all(map(torch.equal, kept, bench.kept_bits()))
    assert bench.programs.is_traced


@pytest.mark.parametrize("is_packed", [False, True])
def test_programs_of_large_layers_compute_what_the_layers_compute(is_packed: bool, tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", width=1024, is_packed=is_packed)
    bench.plain(bench.states(20), 0)
    for count in (1, 2, 3, 4, 1, 2, 5):
        hidden = bench.states(count)
        assert torch.equal(bench.replayed(hidden, 20), bench.plain(hidden, 20))
    assert bench.programs.is_traced


def test_programs_hold_no_weights_that_change_form(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama", width=512, is_packed=True)
    bench.plain(bench.states(20), 0)
    hidden = bench.states(1)
    first = bench.replayed(hidden, 20)
    for change in (bench.packing.unpack_next, bench.packing.pack_next):
        is_left = True
        while is_left:
            is_left = change()
            assert not bench.programs.is_traced
            assert bench.programs.fits(1) != is_left
            if bench.programs.fits(1):
                output = bench.replayed(hidden, 20)
                assert torch.equal(output, bench.plain(hidden, 20))
                assert bench.programs.is_traced
    assert torch.equal(output, first)


def test_a_token_alone_is_computed_without_python_where_its_pages_follow_each_other(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama")
    bench.plain(bench.states(20), 0)
    bench.replayed(bench.states(1), 20)
    assert bench.programs.is_traced
    (run,) = bench.table.runs(0)
    pages = tuple(range(run.pages[0], run.pages[0] + 30))
    scattered = RowPart(
        row=0, start=0, count=1, past=21, runs=(PageRun(first_token=0, pages=pages, is_consecutive=False),)
    )
    hidden, positions = bench.states(1), torch.tensor([21])
    with torch.inference_mode():
        assert bench.programs.run_lone(hidden, 21, scattered) is None
        output = bench.programs.run(hidden, positions, Batch([scattered], bench.cache, first_layer=0))
    assert torch.allclose(output, bench.plain(hidden, 21), atol=1e-5)
    assert torch.equal(bench.replayed(hidden, 21), bench.plain(hidden, 21))


def test_nothing_is_learnt_from_states_that_are_no_numbers(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama")
    assert bench.replayed(torch.full((1, 64), float("nan")), 0).isnan().all()
    hidden = bench.states(1)
    assert torch.equal(bench.replayed(hidden, 0), bench.plain(hidden, 0))


def test_blocks_that_look_into_tensors_are_not_recorded(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama")
    norm = bench.span.blocks[1].input_layernorm
    norm.register_forward_pre_hook(lambda module, args: args[0].sum().item())
    with pytest.raises(RecordingError, match="look into tensors"):
        bench.replayed(bench.states(1), 0)
    assert not bench.programs.fits(1)


def test_a_step_that_changes_what_blocks_keep_is_not_recorded(tmp_path: Path) -> None:
    """The second time it computes something else."""
    bench = Bench(tmp_path, "llama")
    norm = bench.span.blocks[1].input_layernorm

    def change(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        module.weight.mul_(2)

    norm.register_forward_pre_hook(change)
    with pytest.raises(RecordingError, match="something else"):
        bench.replayed(bench.states(1), 0)
