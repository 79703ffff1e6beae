"""Attention over a packed row of tokens: a function that is registered with Transformers.

New keys and values are written to their pages; each row then attends to its own.

Letters: T tokens of the packed row, H heads, G heads of keys, D their width, S slots of a pool, N a row's new tokens, K
tokens that it attends to.
"""

# ruff: noqa: N803, N806 -- tensors are named by their shape

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch.nn import functional

from petals_core.models import transformers_attention
from petals_server.execution import batch as batches
from petals_server.execution import products
from petals_server.execution.batch import Batch, RowView

NAME: Final = "petals_packed"
OPTIONS: Final = ("scaling", "softcap", "s_aux")
"""What :func:`attend` reads of what Transformers' blocks pass on beside the states, as :func:`attend_in` takes it."""
_MAX_FOLDED: Final = 16
"""New tokens of a row up to which its heads are folded together: then each head of keys is read once."""


def prepare(device: torch.device) -> None:
    """Leave out a kernel of cuDNN that makes a plan for each length of a row: a decode step took 45 ms on an H200."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As Transformers calls it: states [1, H or G, T, D]; returns [1, T, H, D].

    ``softcap`` bounds scores (gemma2), ``s_aux`` is a score per head that takes its part of the attention (gpt_oss).
    """
    batch = batches.current()
    assert batch is not None, "packed attention outside of a packed batch"
    output_TE = attend_in(batch, cast(int, module.layer_idx), query[0], key[0], value[0], scaling, softcap, s_aux)
    return output_TE.view(1, batch.num_tokens, query.shape[1], -1), None


def attend_in(
    batch: Batch,
    block: int,
    query_HTD: torch.Tensor,
    key_GTD: torch.Tensor,
    value_GTD: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """The same in a batch, for a block of the span; returns [T, H * D]."""
    layer = batch.first_layer + block
    cache = batch.cache
    slots_T = batch.slots_T(cache.group_of[layer])
    keys_SGD, values_SGD = cache.keys_SGD[layer], cache.values_SGD[layer]
    keys_SGD.index_copy_(0, slots_T, key_GTD.transpose(0, 1))
    values_SGD.index_copy_(0, slots_T, value_GTD.transpose(0, 1))
    scale = int(query_HTD.shape[2]) ** -0.5 if scaling is None else scaling
    kind = cache.kinds[layer]
    if batch.kernel is not None and softcap is None and s_aux is None and batch.uses_kernel(kind):
        output_THD = batch.kernel(
            query_HTD.transpose(0, 1),
            cache.paged(keys_SGD),
            cache.paged(values_SGD),
            batch.paged(cache.group_of[layer]),
            scale=scale,
            window=kind.window,
        )
        return output_THD.flatten(1)
    views = batch.views(layer)
    if len(views) == 1:
        return _attend_row(query_HTD, keys_SGD, values_SGD, views[0], scale, softcap, s_aux)
    return torch.cat(
        [
            _attend_row(
                query_HTD[:, view.start : view.start + view.count], keys_SGD, values_SGD, view, scale, softcap, s_aux
            )
            for view in views
        ]
    )


def _attend_row(
    query_HND: torch.Tensor,
    keys_SGD: torch.Tensor,
    values_SGD: torch.Tensor,
    view: RowView,
    scale: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """A row's attention [N, H * D]."""
    if isinstance(view.slots, slice):
        keys_KGD, values_KGD = keys_SGD[view.slots], values_SGD[view.slots]
    else:
        keys_KGD, values_KGD = keys_SGD.index_select(0, view.slots), values_SGD.index_select(0, view.slots)
    keys_GKD, values_GKD = keys_KGD.transpose(0, 1), values_KGD.transpose(0, 1)
    # A trace holds sizes as numbers, where they would be tensors to compute with.
    num_heads, count, size = map(int, query_HND.shape)
    num_groups = int(keys_GKD.shape[0])
    if softcap is not None or sinks_H is not None:
        output_HND = _attend_by_scores(query_HND, keys_GKD, values_GKD, view, scale, softcap, sinks_H)
    elif count == 1:
        folded = query_HND.reshape(1, num_groups, num_heads // num_groups, size)
        is_doubled = num_groups == num_heads and folded.dtype is torch.bfloat16 and folded.device.type == "cpu"
        if is_doubled:
            # With one query to a head torch 2.13 takes 3 to 6 times as long as with two (AVX-512, 64 to 4,096 keys).
            folded = folded.expand(1, num_heads, 2, -1).contiguous()
        output = functional.scaled_dot_product_attention(folded, keys_GKD[None], values_GKD[None], scale=scale)
        return (output[:, :, :1] if is_doubled else output).reshape(1, -1)
    elif view.mask is not None and count <= _MAX_FOLDED:
        per_group = num_heads // num_groups
        folded = query_HND.reshape(1, num_groups, per_group * count, -1)
        mask = view.mask if per_group == 1 else view.mask.repeat(per_group, 1)
        output_HND = functional.scaled_dot_product_attention(
            folded, keys_GKD[None], values_GKD[None], attn_mask=mask, scale=scale
        ).reshape(num_heads, count, -1)  # on CUDA the result lies otherwise in memory than on CPUs
    elif products.suits(query_HND, keys_GKD):
        output_HND = products.attend(query_HND, keys_GKD, values_GKD, None if view.sees_past else view.mask, scale)
    else:
        output_HND = functional.scaled_dot_product_attention(
            query_HND[None],
            keys_GKD[None],
            values_GKD[None],
            attn_mask=view.mask,
            is_causal=view.is_causal,
            scale=scale,
            enable_gqa=num_groups != num_heads,
        )[0]
    return output_HND.transpose(0, 1).reshape(count, -1)


def _attend_by_scores(
    query_HND: torch.Tensor,
    keys_GKD: torch.Tensor,
    values_GKD: torch.Tensor,
    view: RowView,
    scale: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with what fused kernels do not have, in the order in which Transformers' own functions do it."""
    num_heads, count, size = query_HND.shape
    num_groups = keys_GKD.shape[0]
    folded = query_HND.reshape(num_groups, -1, size)
    scores_HNK = (folded @ keys_GKD.transpose(1, 2)).view(num_heads, count, -1) * scale
    if softcap is not None:
        scores_HNK = torch.tanh(scores_HNK / softcap) * softcap
    if view.mask is not None:
        scores_HNK = scores_HNK + view.mask
    elif view.is_causal:
        later = torch.ones(count, count, dtype=torch.bool, device=scores_HNK.device).triu_(1)
        scores_HNK = scores_HNK.masked_fill(later, float("-inf"))
    if sinks_H is not None:
        sinks_HN1 = sinks_H.to(scores_HNK.dtype).view(-1, 1, 1).expand(num_heads, count, 1)
        scores_HNK = torch.cat([scores_HNK, sinks_HN1], dim=2)
        shares_HNK = torch.softmax(scores_HNK - scores_HNK.amax(dim=2, keepdim=True), dim=2)[:, :, :-1]
    else:
        shares_HNK = torch.softmax(scores_HNK, dim=2, dtype=torch.float32)
    shares = shares_HNK.to(values_GKD.dtype).reshape(num_groups, -1, shares_HNK.shape[2])
    return (shares @ values_GKD).view(num_heads, count, -1)


transformers_attention.register(NAME, attend)
