"""Large weights change form, and steps give the same but for the last bits."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import Span, load_span
from petals_core.testing.factories import make_checkpoint
from petals_server.execution import linear, packing
from petals_server.execution.linear import Linear
from petals_server.execution.packing import Packing, packing_of


def make_linear(module: nn.Module) -> list[Linear]:
    """Let layers be multiplied by oneDNN, however fast that is."""
    layers = [each for each in module.modules() if type(each) is nn.Linear]
    for layer in layers:
        layer.__class__ = Linear
    return [layer for layer in layers if isinstance(layer, Linear)]


def make_span(folder: Path, *, num_blocks: int) -> Span:
    make_checkpoint(folder, "llama", num_blocks=num_blocks, hidden_size=512)
    return load_span(Checkpoint.open(folder), 0, num_blocks)


class Holder:
    """Counts how often it is told to forget."""

    def __init__(self) -> None:
        self.num_told = 0

    def forget(self) -> None:
        self.num_told += 1


def test_weights_change_form_one_layer_at_a_time_and_whoever_holds_them_is_told() -> None:
    model = nn.Sequential(nn.Linear(512, 600), nn.Linear(600, 64), nn.Linear(64, 64), nn.Linear(64, 8192))
    layers = make_linear(model.requires_grad_(False))
    weights, states = [layer.weight for layer in layers], torch.randn(3, 512)
    expected = model(states)
    changing, holder = Packing(layers), Holder()
    changing.tell(holder)

    def forms() -> list[bool]:
        return [layer.weight.is_mkldnn for layer in layers]

    assert changing.is_whole
    assert forms() == [True, False, False, True]  # the others are too small
    assert sum(layer.weight.nbytes for layer in layers) == sum(weight.nbytes for weight in weights)
    packed = model(states)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    for _ in range(2):
        assert changing.unpack_next()
        assert changing.is_mixed
        assert sum(forms()) == 1
        torch.testing.assert_close(model(states), expected, rtol=1e-5, atol=1e-5)
        assert not changing.unpack_next()
        assert changing.is_plain
        assert not any(forms())
        assert all(map(torch.equal, weights, (layer.weight for layer in layers)))
        assert not changing.unpack_next()
        assert changing.pack_next()
        assert changing.is_mixed
        torch.testing.assert_close(model(states), expected, rtol=1e-5, atol=1e-5)
        assert not changing.pack_next()
        assert changing.is_whole
        assert torch.equal(model(states), packed)
        assert not changing.pack_next()
    assert holder.num_told == 8


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Let threads take turns as often as can be."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before_s)


@pytest.mark.usefixtures("hasty_threads")
def test_holders_come_from_other_threads_while_weights_change() -> None:
    changing = Packing(make_linear(nn.Linear(512, 512)))
    holders = [Holder() for _ in range(1000)]
    for holder in holders:
        changing.tell(holder)
    is_over = threading.Event()

    def tell() -> None:
        while not is_over.is_set():
            holders.append(Holder())
            changing.tell(holders[-1])

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        for _ in range(3):
            changing.undo()
            changing.pack_next()
    finally:
        is_over.set()
        thread.join()
    assert {holder.num_told for holder in holders[:1000]} == {6}
    assert len(holders) > 1000
    assert {holder.num_told for holder in holders[1000:]} <= set(range(7))


def test_layers_of_a_span_are_changed_where_that_is_faster(tmp_path: Path) -> None:
    span = make_span(tmp_path, num_blocks=1)
    packing.install(span)
    layers = [module for module in span.blocks.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 7
    assert {type(layer) for layer in layers} == {Linear if linear.is_faster() else nn.Linear}
    assert (packing_of(span) is not None) == linear.is_faster()
    assert any(layer.weight.is_mkldnn for layer in layers) == linear.is_faster()
    packing.unpack(span)
    assert not any(layer.weight.is_mkldnn for layer in layers)


def test_parts_of_a_span_have_their_weights_in_the_same_form(tmp_path: Path) -> None:
    span, plain = (make_span(tmp_path, num_blocks=3) for _ in range(2))
    changing = Packing(make_linear(span.blocks))
    part, states = span.slice(1, 3), torch.randn(1, 3, 512)
    assert packing_of(part) is changing
    expected = plain.slice(1, 3)(states)
    packed = part(states)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)
    packing.unpack(part)
    assert not any(layer.weight.is_mkldnn for layer in span.blocks.modules() if isinstance(layer, Linear))
    torch.testing.assert_close(part(states), expected, rtol=1e-4, atol=1e-4)
    while changing.pack_next():
        torch.testing.assert_close(part(states), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(part(states), packed)


def test_weights_that_blocks_read_themselves_stay_in_torchs_order(tmp_path: Path) -> None:
    span = make_span(tmp_path, num_blocks=2)

    def look(module: Any, args: object) -> None:
        assert module.mlp.up_proj.weight[0].sum() != 0

    span.blocks[1].register_forward_pre_hook(look)
    packing.install(span)
    assert packing_of(span) is None
    assert span(torch.zeros(1, 3, 512), cache=None).shape == (1, 3, 512)


def test_layers_of_other_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", num_blocks=1)
    span = load_span(Checkpoint.open(tmp_path), 0, 1, dtype=torch.bfloat16)
    packing.install(span)
    assert not any(isinstance(module, Linear) for module in span.blocks.modules())
