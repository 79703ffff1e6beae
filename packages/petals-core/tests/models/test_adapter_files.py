"""Adapters that can't be used are refused in one line that says why; others are read to the last bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petals_core.errors import CheckpointError, ConfigurationError
from petals_core.models.adapter_files import AdapterFiles, save_adapter
from petals_core.models.low_rank import Adapter

SHAPES = [{"self_attn.q_proj": (8, 6), "mlp.gate": (8, 4)}] * 3
CONFIG: Mapping[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "somebody/tiny"}
Q = "model.layers.{}.self_attn.q_proj"


def matrices(path: str, rank: int = 2, inputs: int = 8, outputs: int = 6) -> dict[str, Tensor]:
    return {f"{path}.lora_A.weight": torch.randn(rank, inputs), f"{path}.lora_B.weight": torch.randn(outputs, rank)}


def load(folder: Path, **changes: Any) -> Adapter:
    settings: dict[str, Any] = {"block_path": "layers", "start": 0, "shapes": SHAPES, "model_type": "mixtral"}
    files = AdapterFiles.open(folder)
    files.check_blocks("layers", 3)
    return files.load(**settings | changes)


def test_a_span_gets_its_own_blocks(tmp_path: Path) -> None:
    tensors = {**matrices(Q.format(0)), **matrices(Q.format(2)), "score.weight": torch.ones(2, 8)}
    config = {**CONFIG, "use_rslora": True, "alpha_pattern": {"layers.2.self_attn.q_proj": 4}}
    save_adapter(tmp_path / "mine", config, tensors)
    assert AdapterFiles.open(tmp_path / "mine").outside("layers") == ("score.weight",)
    adapter = load(tmp_path / "mine", start=1, shapes=SHAPES[1:])
    ((index, layers),) = adapter.blocks.items()
    assert (index, list(layers)) == (2, ["self_attn.q_proj"])
    assert torch.equal(layers["self_attn.q_proj"].down_KI, tensors[f"{Q.format(2)}.lora_A.weight"])
    assert torch.equal(layers["self_attn.q_proj"].up_OK, tensors[f"{Q.format(2)}.lora_B.weight"])
    assert layers["self_attn.q_proj"].scaling == pytest.approx(4 / 2**0.5)


def test_names_that_transformers_has_changed(tmp_path: Path) -> None:
    save_adapter(tmp_path, CONFIG, matrices("model.layers.1.block_sparse_moe.gate", outputs=4))
    assert list(load(tmp_path).blocks[1]) == ["mlp.gate"]


def test_a_name_tells_what_it_is(tmp_path: Path) -> None:
    for folder, alpha in (("one", 6), ("two", 6), ("three", 7)):
        torch.manual_seed(0)
        save_adapter(tmp_path / folder / "poems", {**CONFIG, "lora_alpha": alpha}, matrices(Q.format(0)))
    names = [AdapterFiles.open(tmp_path / folder / "poems").name for folder in ("one", "two", "three")]
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("poems@") for name in names)
    with pytest.raises(ConfigurationError, match="NAME=PATH"):
        AdapterFiles.open(tmp_path / "one" / "poems", name="bad name")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3: only LORA"),
        ({"use_dora": True}, "use_dora: DoRA can't be used"),
        ({"bias": "all"}, "biases"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "no linear layers"),
        ({"r": "eight"}, "broken"),
        ({"lora_alpha": None}, "broken"),
        ({"alpha_pattern": {"(a+)+": 1}}, "broken"),
    ],
)
def test_settings_that_can_not_be_used(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    save_adapter(tmp_path, {**CONFIG, **changes}, matrices(Q.format(0)))
    with pytest.raises(ConfigurationError, match=text):
        load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (matrices("model.h.0.attn"), "changes no blocks.*trained for somebody/tiny"),
        (matrices(Q.format(3)), "changes block 3, and the model has 3"),
        (matrices(Q.format(0), rank=300), "rank 300 at .*: at most 256"),
        (matrices(Q.format(0), inputs=9), r"\[2, 9\] and \[6, 2\], and the layer has 8 inputs and 6 outputs"),
        (matrices("model.layers.0.mlp.experts.1.w2"), r"mlp\.experts\.1\.w2, which is no linear layer"),
        ({f"{Q.format(0)}.lora_A.weight": torch.ones(2, 8)}, "no model.layers.0.self_attn.q_proj.lora_B"),
        ({f"{Q.format(0)}.bias": torch.ones(2)}, "no matrix of a linear layer"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], text: str) -> None:
    save_adapter(tmp_path, CONFIG, tensors)
    with pytest.raises(ConfigurationError, match=text):
        load(tmp_path)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        AdapterFiles.open(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        AdapterFiles.open(tmp_path / "nothing")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(CONFIG)))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickled, which is not safe"):
        AdapterFiles.open(tmp_path)
