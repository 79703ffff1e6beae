"""Attention by oneDNN's products."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from petals_server.cache.pages import CachePages, plan_groups
from petals_server.cache.tensors import CacheTensors, LayerKind
from petals_server.execution import linear, products
from petals_server.execution.batch import Batch, causal_mask, first_seen
from petals_server.scheduling.plan import RowPart


def make_states(num_heads: int, num_groups: int, num_new: int, num_keys: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, the latter two as they lie in a cache."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(num_keys, num_groups, size, generator=generator).transpose(0, 1) for size in (64, 32))
    return torch.randn(num_heads, num_new, 64, generator=generator), keys, values


@pytest.mark.skipif(linear.OPERATION is None, reason="this torch comes without oneDNN")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("num_heads", "num_groups", "num_new", "num_keys"),
    [(8, 2, 17, 600), (4, 4, 64, 640), (2, 2, 256, 256), (8, 2, 150, 1200)],
)
@torch.inference_mode()
def test_it_is_the_attention_of_torch(
    num_heads: int, num_groups: int, num_new: int, num_keys: int, window: int | None
) -> None:
    query, keys, values = make_states(num_heads, num_groups, num_new, num_keys)
    seen = torch.ones(num_new, num_keys, dtype=torch.bool).tril_(num_keys - num_new)
    if window is not None:
        seen.triu_(num_keys - num_new - window + 1)
    mask = torch.zeros(num_new, num_keys).masked_fill_(~seen, float("-inf"))
    expected = functional.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, scale=0.2, enable_gqa=True
    )[0]
    actual = products.attend(query, keys, values, None if window is None else mask, 0.2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_few_or_very_many_scores_and_other_dtypes_are_left_to_torch() -> None:
    query, keys, _ = make_states(8, 2, 17, 600)
    long = torch.empty(1, 1, 64).expand(2, 1 << 18, 64)
    assert products.suits(query, long) == linear.is_faster()
    assert not products.suits(query, torch.empty(1, 1, 64).expand(2, 1 << 19, 64))
    assert products.suits(query, keys) == linear.is_faster()
    assert not products.suits(query, keys[:, :400])
    assert not products.suits(query.bfloat16(), keys.bfloat16())


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_masks_are_left_out_where_tokens_see_all_keys_up_to_their_own(window: int | None, is_chunked: bool) -> None:
    kind = LayerKind(num_heads=1, key_size=4, value_size=4, window=window, is_chunked=is_chunked and window is not None)
    pages = CachePages(plan_groups([window], num_tokens=64, page_tokens=4), page_tokens=4)
    cache = CacheTensors([kind], pages, dtype=torch.float32, device=torch.device("cpu"))
    for past in range(18):
        for count in range(2, 12):
            session = pages.open(1)
            for before, taken in ((0, past), (past, count)):
                session.grow([before], [taken])
                session.grow_window(0, before, taken)
            row = RowPart(row=0, start=0, count=count, past=past, runs=session.runs(0))
            (view,) = Batch([row], cache, first_layer=0).views(0)
            mask = causal_mask(
                past, count, first_seen(past, kind), kind, dtype=torch.float32, device=torch.device("cpu")
            )
            plain = torch.full(mask.shape, float("-inf")).triu_(mask.shape[1] - count + 1)
            assert view.sees_past == torch.equal(mask, plain)
            session.close()
