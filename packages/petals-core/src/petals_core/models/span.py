"""The server's part of a model: consecutive blocks, loaded without the rest and ready to run.

A span is Transformers' own base model with other blocks and everything around them removed, called with
``inputs_embeds``, so an architecture works when Transformers has it.

Letters: B rows of a batch, T tokens of a step, P tokens in the cache before it, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from petals_core.errors import InvalidRequestError
from petals_core.models import transformers_attention as attentions
from petals_core.models import transformers_caches as caches
from petals_core.models import transformers_cutting as cutting
from petals_core.models import transformers_loading as loading
from petals_core.models import transformers_quantization as quantizers
from petals_core.models import transformers_structure as structure
from petals_core.models.architecture import Architecture, block_count, find_architecture, tensor_names
from petals_core.models.checkpoint import Checkpoint, resolve_dtype
from petals_core.models.devices import check_device
from petals_core.models.memory import release_memory
from petals_core.models.transformers_experts import fuse_experts

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel


class Span:
    """Blocks ``start`` up to ``end`` of a model, ready to run. Made by :func:`load_span`.

    Gradients flow to the hidden states unless the caller forbids it; weights have none.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        architecture: Architecture,
        start: int,
        end: int,
        dtype: torch.dtype,
        quantization: str = "none",
    ) -> None:
        self.model = model
        """Transformers' base model with nothing but the span's blocks; its config is the span's."""
        self.architecture = architecture
        self.start = start
        self.end = end
        self.dtype = dtype
        self.device: torch.device = model.device  # found by a walk through all modules, which a step has no time for
        self.quantization = quantization
        """One of ``petals_core.announcement.QUANTIZATIONS``."""
        self._continues_by_tokens = model.config.model_type in structure.CONTINUED_BY_TOKENS
        self._takes_positions = structure.takes_position_ids(type(model).forward)

    @property
    def num_blocks(self) -> int:
        return self.end - self.start

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config with the span's number of blocks and per-block lists."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        return self.architecture.hidden_size

    @property
    def is_recurrent(self) -> bool:
        """Whether a block of this span keeps a state that :meth:`crop` can't cut back."""
        return caches.is_recurrent(self.config)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.architecture.block_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return quantizers.num_bytes(self.model)

    @property
    def quantized_share(self) -> float:
        """Which part of the weights is quantized."""
        return quantizers.quantized_share(self.model)

    def forward(
        self,
        hidden_BTH: torch.Tensor,  # noqa: N803
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Run hidden states through the span's blocks.

        Args:
            hidden_BTH: on this span's device, in its dtype.
            attention_mask: [B, P + T], 1 where there is a token and 0 for padding; None where all are tokens.
            position_ids: [B, T]; None where they go on from the cache's length. Ignored by models without positions.
            cache: from :meth:`new_cache`, to be read and extended by T tokens; None to keep nothing.
            kwargs: handed on to the blocks' attention (see ``AttentionInterface`` of Transformers).

        Returns:
            Hidden states of the same shape and dtype.
        """
        num_tokens = hidden_BTH.shape[1]
        if position_ids is None and cache is not None and self._takes_positions:
            # Said always, because some models count from 0 in each call (bamba).
            past = int(cache.get_seq_length())
            position_ids = torch.arange(past, past + num_tokens, device=hidden_BTH.device)[None]
        if cache is None or num_tokens == 1 or not self._continues_by_tokens or not cache.get_seq_length():
            return self._run(hidden_BTH, attention_mask, position_ids, cache, **kwargs)
        parts = []
        for column, token in enumerate(hidden_BTH.split(1, dim=1)):
            mask = attention_mask
            if mask is not None:
                mask = mask[:, : mask.shape[1] - num_tokens + column + 1]
            positions = None if position_ids is None else position_ids[:, column : column + 1]
            parts.append(self._run(token, mask, positions, cache, **kwargs))
        return torch.cat(parts, dim=1)

    def _run(
        self,
        hidden_BTH: torch.Tensor,  # noqa: N803
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        **kwargs: object,
    ) -> torch.Tensor:
        output = self.model(
            inputs_embeds=hidden_BTH,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
            **kwargs,
        )
        if cache is not None:
            caches.note_tokens(cache, hidden_BTH.shape[1])
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    __call__ = forward

    def forward_packed(
        self,
        hidden_1TH: torch.Tensor,  # noqa: N803
        position_ids: torch.Tensor,
        *,
        attention: str,
    ) -> torch.Tensor:
        """Run tokens of any number of sequences through the blocks as one row, without a cache of the model's own.

        Args:
            position_ids: [1, T], of each token in its sequence.
            attention: name of a function registered by :func:`transformers_attention.register`; which tokens belong
                together, and to what came before, is its business.
        """
        with attentions.used(self.model, attention):
            return self._run(hidden_1TH, None, position_ids, None)

    def slice(self, start: int, end: int) -> Span:
        """Blocks ``start`` up to ``end`` of the model, which this span holds, as a span that shares its weights.

        Raises:
            InvalidRequestError: this span does not hold them.
        """
        if not self.start <= start < end <= self.end:
            raise InvalidRequestError(f"blocks {start}:{end} are not within {self.start}:{self.end}")
        if (start, end) == (self.start, self.end):
            return self
        model = cutting.narrow(self.model, self.architecture.block_path, start - self.start, end - self.start)
        return Span(
            model=model,
            architecture=self.architecture,
            start=start,
            end=end,
            dtype=self.dtype,
            quantization=self.quantization,
        )

    def new_cache(self) -> Cache:
        """An empty attention cache for this span, which keeps all tokens even where the model has windows."""
        return caches.new_cache(self.config)

    def crop(self, cache: Cache, num_tokens: int) -> None:
        """Forget all but the first ``num_tokens`` tokens of a cache.

        Recurrent states do not change by it: their user puts back older ones that it copied, and computes again what
        came behind them.

        Raises:
            InvalidRequestError: the cache has fewer.
        """
        caches.crop_cache(cache, num_tokens)

    def copy_states(self, cache: Cache, rows: torch.Tensor | None = None) -> list[torch.Tensor | None]:
        """Copies of a cache's recurrent states, of ``rows`` (int64) or of all; None for what is still zero."""
        return caches.copy_states(cache, rows)

    def put_states(self, cache: Cache, copies: list[torch.Tensor | None], rows: torch.Tensor | None = None) -> None:
        """Put copies of recurrent states back in the place of those that the cache has now."""
        caches.put_states(cache, copies, rows)

    @torch.inference_mode()
    def measure_cache_bytes(self) -> tuple[int, int]:
        """Memory of one token in a cache, and of what each row takes beside its tokens, measured by computing one."""
        cache = self.new_cache()
        self(torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device), cache=cache)
        return caches.cache_bytes(cache)

    @torch.inference_mode()
    def measure_cache_shapes(self) -> list[tuple[int, int, int]]:
        """For each block the heads of its keys and the widths of its keys and values, measured by computing a token."""
        cache = self.new_cache()
        self(torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device), cache=cache)
        return caches.cache_shapes(cache)


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    quantization: str = "none",
) -> Span:
    """Load blocks ``start`` up to ``end`` and nothing else; only the files that hold them are opened or downloaded.

    Args:
        dtype: what to compute in; ``auto`` is the checkpoint's own.
        attn_implementation: as in Transformers (``sdpa``, ``eager``, or a registered function's name).
        quantization: ``none``, ``int8``, ``nf4``, or ``auto`` by device. Weights that are stored quantized are taken
            as they are.

    Raises:
        InvalidRequestError: the model has no such span, or no such attention.
        UnsupportedModelError: the model can't be split, or what its quantization needs is missing.
        ConfigurationError: the weights are stored quantized in another way.
        CheckpointError: files are missing or broken, or do not fit the config.
        DeviceError: there is no such device, or it can't compute in ``dtype``.
        NotEnoughMemoryError: the span does not fit the device.
    """
    num_blocks = block_count(checkpoint.config)
    if not 0 <= start < end <= num_blocks:
        raise InvalidRequestError(f"{checkpoint.name} has blocks 0 to {num_blocks - 1}: {start}:{end} is no span of it")
    dtype = resolve_dtype(dtype, checkpoint)
    device = check_device(device, dtype)
    architecture = find_architecture(checkpoint.config)
    form = quantizers.plan(
        checkpoint.config,
        quantization,
        device=device,
        dtype=dtype,
        num_linear=sum(architecture.block_linear_parameters[start:end]),
    )
    names = tensor_names(checkpoint, architecture)
    wanted = {
        names.renumbered(name, index - start): name for index in range(start, end) for name in names.by_block[index]
    }
    num_bytes = checkpoint.fetch(wanted.values())

    tensors = checkpoint.lazy(wanted, num_bytes=num_bytes)

    def cut(model: PreTrainedModel) -> None:
        cutting.cut(model, architecture.block_path, architecture.multipliers, start, end)
        if form.config is not None:
            quantizers.make_linear_layers_plain(model)
        if not form.is_stored:
            fuse_experts(model, tensors)

    model, _ = loading.load(
        loading.make_subclass(architecture.base_class, cut),
        checkpoint,
        quantizers.span_config(checkpoint.config, architecture.block_path, start, end)
        if form.is_stored
        else checkpoint.config,
        tensors,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        quantization_config=form.config,
    )
    model.__class__ = architecture.base_class
    model.requires_grad_(False)
    model.eval()
    quantizers.finish(model, form, dtype)
    release_memory()
    return Span(model=model, architecture=architecture, start=start, end=end, dtype=dtype, quantization=form.name)
