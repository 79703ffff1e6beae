from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MiniMaxConfig,
    Qwen3NextConfig,
    T5Config,
    ViTConfig,
    Zamba2Config,
)

from petals_core.errors import (
    CheckpointError,
    DeviceError,
    InvalidRequestError,
    PetalsError,
    UnsupportedModelError,
)
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.split import (
    Span,
    block_count,
    check_device,
    find_architecture,
    load_client_half,
    load_span,
)
from petals_core.testing.factories import FAMILIES, edit_config, make_checkpoint, make_config

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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture
def folder(family: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the family in several files. Not to be changed."""
    if family not in folders:
        path = tmp_path_factory.mktemp(family)
        folders[family] = make_checkpoint(path, family, num_blocks=NUM_BLOCKS, max_shard_size=100_000)
    return folders[family]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_with_a_cache_that_is_cut_back_equals_one_forward(family: str, folder: Path) -> None:
    span = load_span(Checkpoint.open(folder), 1, 4)
    _, mask = random_batch()
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


@pytest.mark.parametrize("family", ["llama"])
def test_greedy_continuations_wander(family: str, folder: Path) -> None:
    ids, _ = random_batch()
    tokens = local_model(folder).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False
    )
    assert len(set(tokens[2, 12:].tolist())) > 12


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


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (MambaConfig, {}, "a cache of its own kind"),
        (T5Config, {}, "encoder-decoder"),
        (
            Zamba2Config,
            {
                "layers_block_type": ["linear_attention", "hybrid"],
                "num_attention_heads": 2,
                "mamba_ngroups": 1,
                "n_mamba_heads": 4,
                "mamba_headdim": 16,
            },
            "read the embeddings again",
        ),
        (Qwen3NextConfig, {"layer_types": ["indexed_attention", "full_attention"]}, "indexed_attention"),
        (ViTConfig, {}, "can't be served"),
        (MiniMaxConfig, {"layer_types": ["linear_attention", "full_attention"]}, "uses cache of its own"),
    ],
)
def test_what_can_not_be_split_is_refused_in_one_line(config_class: Any, options: dict[str, Any], message: str) -> None:
    try:
        config = config_class(num_hidden_layers=2, hidden_size=32, **options)
    except StrictDataclassClassValidationError:
        pytest.skip(f"this version of Transformers refuses {options} itself")
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        find_architecture(config)
    one_line(raised)


@pytest.mark.parametrize("multiplier", [12, 0.25])
def test_what_multiplies_embeddings_is_found(multiplier: float) -> None:
    architecture = find_architecture(make_config("granite", embedding_multiplier=multiplier))
    assert architecture.multipliers == ("embedding_multiplier",)


def test_devices_that_are_not_here_or_can_not_compute() -> None:
    for device in ("cuda:99", "nonesuch"):
        with pytest.raises(DeviceError, match="there is no device") as raised:
            check_device(device, torch.float32)
        one_line(raised)
    with pytest.raises(DeviceError, match="cpu can't compute in float8_e4m3fn") as raised:
        check_device("cpu", torch.float8_e4m3fn)
    one_line(raised)
    assert check_device("cpu", torch.bfloat16) == torch.device("cpu")


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
