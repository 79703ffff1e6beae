from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from petals_core.testing.factories import make_checkpoint


def test_greedy_continuations_wander(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, num_blocks=6))
    ids = torch.randint(3, 259, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False
    )
    assert len(set(tokens[2, 12:].tolist())) > 12
