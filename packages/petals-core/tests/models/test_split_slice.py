from pathlib import Path

import pytest
import torch

from petals_core.errors import InvalidRequestError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.split import load_span
from petals_core.testing.factories import make_checkpoint


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "opt"])
def test_slices_share_weights_and_amount_to_the_whole(family: str, tmp_path: Path) -> None:
    whole = load_span(Checkpoint.open(make_checkpoint(tmp_path, family, num_blocks=4)), 0, 4)
    parts = [whole.slice(0, 1), whole.slice(1, 4)]
    hidden = torch.randn(2, 9, whole.hidden_size, generator=torch.Generator().manual_seed(0))
    caches = [part.new_cache() for part in parts]
    whole_cache = whole.new_cache()
    with torch.inference_mode():
        for chunk in (hidden[:, :5], hidden[:, 5:]):
            expected = whole(chunk, cache=whole_cache)
            for part, cache in zip(parts, caches, strict=True):
                chunk = part(chunk, cache=cache)
            assert torch.equal(chunk, expected)
    weights = {weight.data_ptr() for weight in whole.model.parameters()}
    assert all(weight.data_ptr() in weights for part in parts for weight in part.model.parameters())
    assert [part.num_blocks for part in parts] == [part.config.num_hidden_layers for part in parts] == [1, 3]


def test_a_slice_of_other_blocks_is_refused(tmp_path: Path) -> None:
    span = load_span(Checkpoint.open(make_checkpoint(tmp_path, num_blocks=4)), 1, 3)
    assert span.slice(1, 3) is span
    with pytest.raises(InvalidRequestError):
        span.slice(0, 2)
