from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from petals_core.models.architecture import block_count, find_architecture
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.client_half import load_client_half
from petals_core.models.span import Span, load_span
from petals_core.testing.factories import FAMILIES, edit_config, make_checkpoint

NUM_BLOCKS = 6
CUTS = [(0, 1), (1, 4), (4, 6)]


class Chain(nn.Module):
    """What stands for the blocks in the client's half: here, spans in this process."""

    attention_type = block_type = "full_attention"

    def __init__(self, *, spans: list[Span], returns_tuples: bool) -> None:
        super().__init__()
        self.spans = spans
        self.returns_tuples = returns_tuples
        self.attention_mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return NUM_BLOCKS

    def __iter__(self) -> Iterator[Chain]:
        return iter([self])

    def __getitem__(self, index: slice) -> Chain:
        assert range(NUM_BLOCKS)[index] == range(NUM_BLOCKS)
        return self

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> Any:
        for span in self.spans:
            hidden = span(hidden, attention_mask=self.attention_mask)
        return (hidden, None) if self.returns_tuples else hidden


def local_model(folder: Path, auto_class: Any = AutoModelForCausalLM) -> Any:
    return auto_class.from_pretrained(folder).eval()


def random_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of three left-padded rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (3, 12), generator=generator)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, :1] = 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_of_spans_computes_what_the_local_model_does(family: str, folder: Path) -> None:
    local = local_model(folder)
    checkpoint = Checkpoint.open(folder)
    spans = [load_span(checkpoint, start, end) for start, end in CUTS]
    architecture = find_architecture(checkpoint.config)
    chain = Chain(spans=spans, returns_tuples=architecture.blocks_return_tuples)
    model = load_client_half(checkpoint, type(local), blocks=chain)
    assert type(model) is type(local)
    assert model.config.num_hidden_layers == NUM_BLOCKS
    ids, mask = random_batch()
    chain.attention_mask = mask
    with torch.inference_mode():
        expected = local(ids, attention_mask=mask).logits
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    difference = ((logits - expected) * mask[:, :, None]).abs().max()
    assert difference <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert sum(span.num_blocks for span in spans) == block_count(checkpoint.config) == NUM_BLOCKS


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
def test_the_client_needs_no_files_of_blocks(family: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    checkpoint = Checkpoint.open(copy)
    list_name = find_architecture(checkpoint.config).block_path
    files = checkpoint.tensor_files(name for name in checkpoint.tensor_names if f"{list_name}." not in name)
    assert len(files) < len(checkpoint.files)
    for path in copy.glob("*.safetensors"):
        if path.name not in files:
            path.unlink()
    blocks = nn.Module()
    blocks.register_parameter("prompt", nn.Parameter(torch.full((3,), 7.0)))
    model = load_client_half(checkpoint, type(local_model(folder)), blocks=blocks)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.base_model.get_submodule(list_name) is blocks
    assert blocks.get_parameter("prompt").tolist() == [7.0] * 3


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_blocks=1, tie_word_embeddings=tied)
    model = load_client_half(Checkpoint.open(folder), LlamaForCausalLM, blocks=nn.Module())
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings is head) == tied
    local = local_model(folder)
    assert torch.equal(embeddings, local.get_input_embeddings().weight)
    assert torch.equal(head, local.get_output_embeddings().weight)


@pytest.mark.parametrize("is_same", [True, False])
def test_tied_weights_that_are_stored_twice(is_same: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_blocks=1, tie_word_embeddings=False)
    if is_same:
        model = local_model(folder)
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
        model.save_pretrained(folder)
    edit_config(folder, tie_word_embeddings=True)
    half = load_client_half(Checkpoint.open(folder), LlamaForCausalLM, blocks=nn.Module())
    assert (half.get_input_embeddings().weight is half.get_output_embeddings().weight) == is_same


@pytest.mark.parametrize("family", ["llama"])
def test_a_classifiers_new_head_is_initialised_and_said(
    family: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint.open(folder)
    config = type(checkpoint.config).from_pretrained(folder, num_labels=3)
    with caplog.at_level(logging.WARNING):
        model = load_client_half(checkpoint, LlamaForSequenceClassification, blocks=nn.Module(), config=config)
    score = model.get_submodule("score").weight
    assert score.shape == (3, 64)
    assert 0.001 < score.std() < 0.1
    assert "score.weight: initialised anew" in caplog.text
    assert torch.equal(model.get_input_embeddings().weight, local_model(folder).get_input_embeddings().weight)
    assert checkpoint.config.num_labels == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_base_model_alone(family: str, folder: Path) -> None:
    local = local_model(folder, AutoModel)
    checkpoint = Checkpoint.open(folder)
    chain = Chain(spans=[load_span(checkpoint, 0, 6)], returns_tuples=False)
    model = load_client_half(checkpoint, type(local), blocks=chain)
    ids, _ = random_batch()
    with torch.inference_mode():
        torch.testing.assert_close(
            model(ids, use_cache=False).last_hidden_state, local(ids).last_hidden_state, rtol=1e-5, atol=1e-5
        )
