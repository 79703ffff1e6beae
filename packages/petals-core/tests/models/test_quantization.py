from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from petals_core.announcement import QUANTIZATIONS
from petals_core.errors import ConfigurationError, PetalsError, UnsupportedModelError
from petals_core.models import transformers_quantization as quantizers
from petals_core.models.architecture import find_architecture
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.client_half import load_client_half
from petals_core.models.span import Span, load_span
from petals_core.testing.factories import edit_config, make_checkpoint

NUM_BLOCKS = 3
HIDDEN = 128


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in float32. Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("plain"), num_blocks=NUM_BLOCKS, hidden_size=HIDDEN)


def hidden_states(width: int = HIDDEN, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(span: Span, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out, and the gradient of something with respect to what went in."""
    with torch.inference_mode():  # first, because bitsandbytes changed weights in the first inference
        output = span(hidden)
    hidden = hidden.clone().requires_grad_()
    result = span(hidden)
    assert torch.allclose(result, output, rtol=1e-3, atol=1e-3)
    (result * torch.linspace(0, 1, result.numel()).view_as(result)).sum().backward()
    assert hidden.grad is not None
    return output, hidden.grad


def unquantized(module: Any) -> torch.Tensor:
    """The weight that a quantized layer computes with."""
    import bitsandbytes

    if getattr(module.weight, "quant_state", None) is None:
        scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
        codes = module.weight if module.state.CB is None else module.state.CB
        return codes.float() * (scales / 127)[:, None]
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        return quantizers.unpacked_weight(module)
    weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight


def with_weights_of(plain: Span, quantized: Span) -> Span:
    """The plain span with the quantized one's weights put into it."""
    for name, module in plain.model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = unquantized(quantized.model.get_submodule(name)).to(module.weight.dtype)
    return plain


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


# --- quantized while loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "quantization", "dtype", "tolerance"),
    [
        ("llama", "nf4", torch.float32, 0.02),
        ("llama", "int8", torch.float32, 0.05),
        ("bloom", "nf4", torch.bfloat16, 0.04),
        ("falcon", "nf4", torch.float32, 0.02),
    ],
)
def test_a_quantized_span_computes_with_its_weights_and_has_their_gradient(
    family: str, quantization: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, family, num_blocks=2, hidden_size=HIDDEN, dtype=dtype)
    checkpoint = Checkpoint.open(folder)
    span = load_span(checkpoint, 0, 2, quantization=quantization)
    plain = load_span(checkpoint, 0, 2)
    assert (span.quantization, plain.quantization) == (quantization, "none")
    assert span.quantized_share > 0.98
    assert plain.quantized_share == 0
    hidden = hidden_states(dtype=dtype)
    output, gradient = run(span, hidden)
    assert difference(output, plain(hidden)) > tolerance / 4  # quantized it is
    expected, expected_gradient = run(with_weights_of(plain, span), hidden)
    assert difference(output, expected) < tolerance
    assert difference(gradient, expected_gradient) < tolerance
    architecture = find_architecture(checkpoint.config)
    form = quantizers.Quantization(name=quantization)
    estimate = sum(
        form.block_bytes(*counts, dtype)
        for counts in zip(architecture.block_parameters, architecture.block_linear_parameters, strict=True)
    )
    assert span.num_bytes == pytest.approx(estimate, rel=0.1)


def test_parts_of_a_quantized_span_share_its_weights(plain: Path) -> None:
    for quantization in ("nf4", "int8"):
        span = load_span(Checkpoint.open(plain), 0, NUM_BLOCKS, quantization=quantization)
        hidden = hidden_states()
        with torch.inference_mode():
            expected = span(hidden)
            first, last = span.slice(0, 1), span.slice(1, NUM_BLOCKS)
            assert torch.equal(last(first(hidden)), expected)
            assert (last.quantization, last.num_bytes) == (
                quantization,
                pytest.approx(span.num_bytes * 2 / 3, rel=0.01),
            )
            assert torch.equal(span(hidden), expected)
        layers = [each.model.get_submodule("layers.0.mlp.up_proj") for each in (span, first)]
        assert layers[0] is layers[1]


@pytest.mark.parametrize("width", [48, 80])
def test_widths_that_the_fast_kernel_can_not_do(width: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_blocks=1, hidden_size=width, intermediate_size=72)
    span = load_span(Checkpoint.open(folder), 0, 1, quantization="nf4")
    plain = load_span(Checkpoint.open(folder), 0, 1)
    output, gradient = run(span, hidden_states(width))
    expected, expected_gradient = run(with_weights_of(plain, span), hidden_states(width))
    assert difference(output, expected) < 0.02
    assert difference(gradient, expected_gradient) < 0.02


def test_auto_is_no_quantization_on_a_cpu(plain: Path) -> None:
    span = load_span(Checkpoint.open(plain), 0, 1, quantization="auto")
    assert span.quantization == "none"
    assert span.num_bytes == load_span(Checkpoint.open(plain), 0, 1).num_bytes


# --- stored quantized -------------------------------------------------------------------------------------------------


def save_quantized(plain: Path, folder: Path, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
    )
    model.save_pretrained(folder, max_shard_size=100_000)
    return folder


class Chain(nn.Module):
    """Stands for the blocks."""

    attention_type = "full_attention"

    def __init__(self, spans: list[Span]) -> None:
        super().__init__()
        self.spans = spans

    def __len__(self) -> int:
        return NUM_BLOCKS

    def __iter__(self) -> Any:
        return iter([self])

    def __getitem__(self, index: slice) -> Chain:
        return self

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> Any:
        for span in self.spans:
            hidden = span(hidden)
        return hidden


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("fp4", {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp.up_proj"]}),
        ("int8", {"load_in_8bit": True}),
    ],
)
def test_a_checkpoint_that_is_stored_quantized_is_the_local_model(
    kind: str, settings: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    folder = save_quantized(plain, tmp_path, **settings)
    local = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).eval()
    checkpoint = Checkpoint.open(folder)
    assert quantizers.stored_quantization(checkpoint.config) == kind
    spans = [load_span(checkpoint, start, end) for start, end in ((0, 1), (1, 3))]
    assert [span.quantization for span in spans] == [kind, kind]
    model = load_client_half(checkpoint, type(local), blocks=Chain(spans))
    ids = torch.arange(3, 15).view(2, 6)
    with torch.inference_mode():
        assert torch.equal(model(ids, use_cache=False).logits, local(ids).logits)
    assert (
        type(spans[1].blocks[0].mlp.up_proj).__module__.startswith("bitsandbytes") is (kind == "int8") or kind == "nf4"
    )
    if kind == "fp4":
        assert type(spans[1].blocks[0].mlp.up_proj) is nn.Linear
        assert type(spans[1].blocks[1].mlp.up_proj) is not nn.Linear
    with pytest.raises(ConfigurationError, match=f"is stored in {kind} and can't be made"):
        load_span(checkpoint, 0, 1, quantization="int8" if kind != "int8" else "nf4")


def test_float8_with_scales_becomes_the_wanted_dtype_on_a_cpu(plain: Path, tmp_path: Path) -> None:
    exact = {}
    stored = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "_proj.weight" in name:
            rows, columns = weight.shape
            blocks = weight.view(rows // 32, 32, columns // 32, 32)
            scales = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            exact[name] = (codes.float() * scales[:, None, :, None]).view(rows, columns)
            stored[name] = codes.view(rows, columns)
            stored[f"{name}_scale_inv"] = scales
        else:
            exact[name] = stored[name] = weight
    for folder, tensors in (("exact", exact), ("float8", stored)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((plain / "config.json").read_bytes())
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    edit_config(tmp_path / "float8", quantization_config=settings)
    checkpoint = Checkpoint.open(tmp_path / "float8")
    for dtype in (torch.float32, torch.bfloat16):
        span = load_span(checkpoint, 1, 3, dtype=dtype)
        assert span.quantization == "none"
        expected = load_span(Checkpoint.open(tmp_path / "exact"), 1, 3, dtype=dtype)
        assert torch.equal(span(hidden_states(dtype=dtype)), expected(hidden_states(dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_sources_of_another_dtype_are_cast(dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    tensors = {name: weight.to(dtype) if "_proj" in name else weight for name, weight in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    span = load_span(Checkpoint.open(tmp_path), 1, 2, dtype="bfloat16")
    weight = span.blocks[0].mlp.up_proj.weight
    assert torch.equal(weight, tensors["model.layers.1.mlp.up_proj.weight"].to(torch.bfloat16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 8}, "stored quantized in gptq, which can't be used on cpu"),
        ({"quant_method": "hqq"}, "stored quantized in hqq, which can't be used on cpu here"),
        ({"quant_method": "novel"}, "stored quantized in novel, which this version of Transformers does not know"),
    ],
)
def test_what_transformers_can_not_run_here_is_refused_in_one_line(
    settings: dict[str, Any], message: str, plain: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(plain / name)
    config = json.loads((plain / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    refuses(tmp_path, "none", UnsupportedModelError, message)


def test_what_can_not_be_quantized_is_refused(plain: Path, tmp_path: Path) -> None:
    refuses(plain, "int4", ConfigurationError, "quantization int4 is none of auto, none, int8, nf4")
    config = Checkpoint.open(plain).config
    with pytest.raises(UnsupportedModelError, match="llama keeps its weights in no layers that can be quantized"):
        quantizers.plan(config, "nf4", device=torch.device("cpu"), dtype=torch.float32, num_linear=0)


def refuses(folder: Path, quantization: str, kind: type[PetalsError], message: str) -> None:
    with pytest.raises(kind, match=message) as raised:
        load_span(Checkpoint.open(folder), 0, 1, quantization=quantization)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_every_kind_that_is_told_has_a_name() -> None:
    assert {"none", "int8", "nf4", "other"} <= set(QUANTIZATIONS)
    assert set(quantizers._WEIGHT_BYTES) <= set(QUANTIZATIONS)
