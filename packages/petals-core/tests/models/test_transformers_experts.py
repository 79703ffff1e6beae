from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from petals_core.models.architecture import find_architecture
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.transformers_experts import FusedTensor, fuse_experts
from petals_core.models.transformers_structure import build_on_meta
from petals_core.testing.factories import make_checkpoint


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_read_one_by_one_into_their_place(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, family, num_blocks=1))
    names = [name for name in checkpoint.tensor_names if ".layers.0." in name]
    tensors = checkpoint.lazy({name: name for name in names})
    architecture = find_architecture(checkpoint.config)
    fuse_experts(build_on_meta(architecture.base_class, checkpoint.config), tensors)
    fused = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, FusedTensor)}
    assert {name.rpartition(".")[2] for name in fused} == {"gate_up_proj", "down_proj"}
    assert len(tensors) == len(names) - 3 * 4 + 2
    local = AutoModel.from_pretrained(tmp_path).state_dict()
    for name, tensor in fused.items():
        assert torch.equal(tensor[...], local[name])


def test_experts_in_odd_numbers_are_left_to_transformers(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "mixtral", num_blocks=1))
    names = [name for name in checkpoint.tensor_names if ".layers.0." in name and "experts.2.w1" not in name]
    tensors = checkpoint.lazy({name: name for name in names})
    architecture = find_architecture(checkpoint.config)
    fuse_experts(build_on_meta(architecture.base_class, checkpoint.config), tensors)
    assert len(tensors) == len(names) - 4 + 1
