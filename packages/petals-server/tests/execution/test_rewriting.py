"""Rules that write recorded operations anew: what becomes of them, and that not one bit changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.nn import functional

from petals_server.execution.programs import Recorder
from petals_server.execution.rewriting import RULES, rewrite

Function = Callable[[torch.Tensor], torch.Tensor]


class Noted:
    """The operations of a function, before and after they are written anew."""

    @torch.inference_mode()
    def __init__(self, function: Function, states: torch.Tensor) -> None:
        recorder = Recorder([states], batch=None)  # type: ignore[arg-type]
        with recorder:
            output = function(states)
        graph = recorder.graph
        graph.output(recorder._as_nodes(output))
        self.before = names(graph)
        rewrite(graph, recorder.constants, RULES)
        self.after = names(graph)
        constants = [recorder.constants[node] for node in graph.nodes if node in recorder.constants]
        program = fx.GraphModule({}, graph).forward
        self.is_equal = all(
            same_bits(program(each, None, *constants), function(each)) for each in (states, states * 1e-3, -states * 7)
        )


def names(graph: fx.Graph) -> list[str]:
    calls = [node.target for node in graph.nodes if node.op.startswith("call_")]
    return [(call if isinstance(call, str) else call.__name__).partition(".")[0] for call in calls]


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[first.element_size()]
    return first.dtype is second.dtype and torch.equal(first.view(integer), second.view(integer))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def rotated(states: torch.Tensor) -> torch.Tensor:
    """As rotary positions are applied, to states of two heads."""
    half, sines = states.shape[-1] // 2, torch.sin(ANGLES)
    return torch.cat((-states[..., half:], states[..., :half]), dim=-1) * sines


ANGLES, WEIGHT, BIAS = random(8), random(24, 16), random(24)
TURNED = WEIGHT.t().contiguous()
CASES: dict[str, tuple[Function, tuple[int, ...], list[str], list[str]]] = {
    "ones": (lambda x: torch.exp(x) * 1.0, (3, 4), ["exp", "mul"], ["exp"]),
    "squares": (lambda x: x.pow(2), (3, 4), ["pow"], ["mul"]),
    "means of 1024": (lambda x: x.mean(-1, keepdim=True), (3, 1024), ["mean"], ["sum", "mul_"]),
    "means of 1000": (lambda x: x.mean(-1, keepdim=True), (3, 1000), ["mean"], ["sum", "div_"]),
    "norms": (
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        (1, 3, 64),
        ["pow", "mean", "add", "rsqrt", "mul"],
        ["select", "mul", "sum", "add", "rsqrt_", "mul", "unsqueeze"],
    ),
    "the first dimension": (
        lambda x: functional.silu(x[None]).view(1, 3, 2, 2).transpose(1, 2)[0],
        (3, 4),
        ["unsqueeze", "silu", "view", "transpose", "select"],
        ["silu", "view", "transpose"],
    ),
    "views of views": (lambda x: x.view(2, 6).view(12).exp(), (3, 4), ["view", "view", "exp"], ["view", "exp"]),
    "views to the same shape": (lambda x: x.view(3, 4).exp(), (3, 4), ["view", "exp"], ["exp"]),
    "one token": (
        lambda x: x[None].view(1, 1, 2, 2).transpose(1, 2)[0].exp(),
        (1, 4),
        ["unsqueeze", "view", "transpose", "select", "exp"],
        ["view", "exp"],
    ),
    "equal operations": (
        lambda x: torch.cat((x.exp(), x.exp()), dim=-1),
        (3, 4),
        ["exp", "exp", "cat"],
        ["exp", "cat"],
    ),
    "turned pairs of a token": (
        rotated,
        (2, 1, 8),
        ["sin", "slice", "neg", "slice", "cat", "mul"],
        ["sin", "mul_", "take", "mul_"],
    ),
    "turned pairs of tokens": (
        rotated,
        (2, 3, 8),
        ["sin", "slice", "neg", "slice", "cat", "mul"],
        ["sin", "slice", "slice", "mul_", "cat", "mul_"],
    ),
    "linear layers": (lambda x: functional.linear(x, WEIGHT), (3, 16), ["linear"], ["mm"]),
    "linear layers with a bias": (
        lambda x: functional.linear(x[None], WEIGHT, BIAS)[0],
        (3, 16),
        ["unsqueeze", "linear", "select"],
        ["linear"],
    ),
    "products and a bias": (lambda x: torch.addmm(BIAS, x, TURNED), (3, 16), ["addmm"], ["linear"]),
    "numbers": (lambda x: (x - 0.1) / 3, (3, 4), ["sub", "div"], ["sub", "div_"]),
    "results that nobody else reads": (
        lambda x: BIAS * functional.silu(functional.linear(x, WEIGHT)),
        (3, 16),
        ["linear", "silu", "mul"],
        ["mm", "silu_", "mul_"],
    ),
    "results that somebody else reads": (
        lambda x: x.exp() + x.exp().sin() * x.exp()[:, :1],
        (3, 4),
        ["exp", "exp", "sin", "exp", "slice", "mul", "add"],
        ["exp", "sin", "slice", "mul_", "add_"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rules_give_the_same_bits_with_other_operations(case: str) -> None:
    function, shape, before, after = CASES[case]
    noted = Noted(function, random(*shape))
    assert noted.before == before
    assert noted.after == after
    assert noted.is_equal
