from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from petals_core.errors import CheckpointError, InvalidRequestError, PetalsError
from petals_core.models.architecture import find_architecture
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_core.testing.factories import FAMILIES, edit_config, make_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_with_a_cache_that_is_cut_back_equals_one_forward(family: str, folder: Path) -> None:
    span = load_span(Checkpoint.open(folder), 1, 4)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, :1] = 0
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 12, 64, generator=generator)
    with torch.inference_mode():
        expected = span(hidden, attention_mask=mask)
        cache = span.new_cache()
        parts = [span(hidden[:, :5], attention_mask=mask[:, :5], cache=cache)]
        states = span.copy_states(cache)
        assert any(state is not None for state in states) == span.is_recurrent
        span(hidden[:, 7:12], attention_mask=mask[:, :10], cache=cache)  # rejected drafts
        span.crop(cache, 5)
        span.put_states(cache, states)
        parts += [span(hidden[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache) for i in range(5, 12)]
        assert cache.get_seq_length() == 12
        result = torch.cat(parts, dim=1)
        span.crop(cache, 0)
        span.put_states(cache, [])
        again = span(hidden, attention_mask=mask, cache=cache)
    for other in (result, again):
        assert ((other - expected) * mask[:, :, None]).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
def test_a_span_needs_and_opens_only_its_own_files(family: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    checkpoint = Checkpoint.open(copy)
    list_name = find_architecture(checkpoint.config).block_path
    own = [name for name in checkpoint.tensor_names if f"{list_name}.3." in name or f"{list_name}.4." in name]
    files = checkpoint.tensor_files(own)
    assert len(files) < len(checkpoint.files)
    for path in copy.glob("*.safetensors"):
        if path.name not in files:
            path.unlink()
    span = load_span(checkpoint, 3, 5)
    assert span.num_blocks == 2
    outside = {name.split(".")[0] for name, _ in span.model.named_parameters()}
    assert outside == {list_name}
    assert span.num_bytes == sum(checkpoint.entry(name).num_bytes for name in own)
    with pytest.raises(CheckpointError, match="missing although"):
        load_span(checkpoint, 0, 6)


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_another_dtype_is_what_the_local_model_has_in_it(family: str, folder: Path) -> None:
    local = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    span = load_span(Checkpoint.open(folder), 2, 4, dtype="bfloat16")
    assert span.dtype == torch.bfloat16
    state = span.model.state_dict()
    assert state
    for name, tensor in state.items():
        first, index, rest = name.split(".", 2)
        assert torch.equal(tensor, local[f"{first}.{int(index) + 2}.{rest}"])


@pytest.mark.parametrize("family", ["llama"])
def test_gradients_flow_to_the_input_and_not_to_weights(family: str, folder: Path) -> None:
    span = load_span(Checkpoint.open(folder), 2, 4)
    hidden = torch.randn(1, 3, 64, requires_grad=True)
    span(hidden).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in span.model.parameters())


@pytest.mark.parametrize("family", ["llama"])
def test_loading_reports_its_progress(family: str, folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    span = load_span(Checkpoint.open(folder, progress=lambda *what: seen.append(what)), 0, 2)
    assert seen[-1][1] == seen[-1][2] == span.num_bytes
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


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


# --- errors -----------------------------------------------------------------------------------------------------------


def one_line(raised: pytest.ExceptionInfo[PetalsError]) -> None:
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 2), (3, 1), (0, 7), (6, 7)])
def test_no_such_span(family: str, folder: Path, start: int, end: int) -> None:
    with pytest.raises(InvalidRequestError, match="has blocks 0 to 5") as raised:
        load_span(Checkpoint.open(folder), start, end)
    one_line(raised)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 100}, "do not fit its config"),
        ({"num_hidden_layers": 7}, "no tensors for block 6 although its config says 7 blocks"),
        ({"attention_bias": True}, "lacks .* tensors that its config asks for"),
    ],
)
@pytest.mark.parametrize("family", ["llama"])
def test_a_config_that_does_not_fit(
    family: str, folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    edit_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_span(Checkpoint.open(copy), 0, 2)
    one_line(raised)


@pytest.mark.parametrize("family", ["llama"])
def test_an_attention_that_is_unknown(family: str, folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="can't use nonesuch attention") as raised:
        load_span(Checkpoint.open(folder), 0, 1, attn_implementation="nonesuch")
    one_line(raised)


@pytest.mark.parametrize("family", ["llama"])
def test_a_cache_is_not_cut_to_more_than_it_has(family: str, folder: Path) -> None:
    span = load_span(Checkpoint.open(folder), 0, 1)
    with pytest.raises(InvalidRequestError, match="can't be kept"):
        span.crop(span.new_cache(), 1)


def test_a_slice_of_other_blocks_is_refused(tmp_path: Path) -> None:
    span = load_span(Checkpoint.open(make_checkpoint(tmp_path, num_blocks=4)), 1, 3)
    assert span.slice(1, 3) is span
    with pytest.raises(InvalidRequestError):
        span.slice(0, 2)
