"""The large weights of a span on a CPU: in oneDNN's order (packed), or in torch's while somebody wants gradients.

They change form one layer at a time, each in the place of what it was before, so a span takes no more memory than in
either form, but for one layer while that changes. Steps may be computed at any point in between.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import nn

from petals_core.errors import first_line
from petals_core.models.span import Span
from petals_server.execution import linear
from petals_server.execution.linear import Linear

log = logging.getLogger(__name__)


class WeightsHolder(Protocol):
    """What keeps weights of layers beside the layers."""

    def forget(self) -> None:
        """Let go of them."""


@final
class Packing:
    """The form of the large weights of layers; packed at first.

    Weights change in the device's thread. Outside of ``inference_mode``: what is made there is no use to gradients.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._layers = [layer for layer in layers if layer.weight.numel() >= linear.MIN_ELEMENTS]
        self._num_packed = 0
        """The first so many are packed, the others are not."""
        self._holders: weakref.WeakSet[WeightsHolder] = weakref.WeakSet()
        self._lock = threading.Lock()
        """Around the holders: sessions bring new ones from the event loop."""
        for layer in self._layers:
            layer.packing = self
        while self.pack_next():
            pass

    @property
    def is_plain(self) -> bool:
        """Whether all weights are in torch's order."""
        return self._num_packed == 0

    @property
    def is_whole(self) -> bool:
        """Whether all weights are packed."""
        return self._num_packed == len(self._layers)

    @property
    def is_mixed(self) -> bool:
        """Whether only some weights are packed: then it is not worth while to hold any."""
        return not self.is_plain and not self.is_whole

    def tell(self, holder: WeightsHolder) -> None:
        """Let a holder of weights know whenever some change form. In any thread."""
        with self._lock:
            self._holders.add(holder)

    def pack_next(self) -> bool:
        """Pack the weights of one more layer; returns whether there are others left."""
        if not self.is_whole:
            layer = self._layers[self._num_packed]
            self._change(layer, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None))
            self._num_packed += 1
        return not self.is_whole

    def unpack_next(self) -> bool:
        """Bring the weights of one more layer back into torch's order; returns whether there are others left."""
        if not self.is_plain:
            layer = self._layers[self._num_packed - 1]
            self._change(layer, layer.weight.to_dense())
            self._num_packed -= 1
        return not self.is_plain

    def undo(self) -> None:
        """Bring all weights back into torch's order."""
        while self.unpack_next():
            pass

    def give_up(self) -> None:
        """Bring all weights back into torch's order, for good."""
        self.undo()
        for layer in self._layers:
            layer.packing = None

    def _change(self, layer: Linear, weight: torch.Tensor) -> None:
        with self._lock:
            for holder in self._holders:
                holder.forget()
        layer.weight = nn.Parameter(weight, requires_grad=False)


def install(span: Span) -> None:
    """Let the span's linear layers be multiplied by oneDNN, if it is loaded on a CPU and that is faster there."""
    if span.device.type != "cpu" or span.dtype is not torch.float32 or not linear.is_faster():
        return
    layers = [module for module in span.blocks.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = Linear
    packing = Packing([layer for layer in layers if isinstance(layer, Linear)])
    if not _can_compute(span):
        packing.give_up()


@torch.inference_mode()
def _can_compute(span: Span) -> bool:
    """Whether a prompt and a token go through the span: some blocks (jamba) read a layer's weights themselves."""
    cache = span.new_cache()
    try:
        for num_tokens in (2, 1):
            span(torch.zeros(1, num_tokens, span.hidden_size), cache=cache)
    except Exception as error:  # whatever blocks do
        log.debug("weights are not packed: %s", first_line(error))
        return False
    return True


def packing_of(span: Span) -> Packing | None:
    """By which weights of the span change form; None: they do not."""
    packings = (module.packing for module in span.blocks.modules() if isinstance(module, Linear))
    return next((packing for packing in packings if packing is not None), None)


def unpack(span: Span) -> None:
    """Bring the span's weights into the order that gradients need; all layers that were packed with them too."""
    packing = packing_of(span)
    if packing is not None:
        packing.undo()
