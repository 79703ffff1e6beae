from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from petals_core.errors import CheckpointError, UnsupportedModelError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span
from petals_core.testing.factories import edit_config, make_checkpoint
from petals_core.testing.hub import NAME, serving

CONFIG = """
from transformers import LlamaConfig

class NovelConfig(LlamaConfig):
    model_type = "novel"
"""
MODEL = """
from transformers import LlamaForCausalLM, LlamaModel
from .config_code import NovelConfig

class NovelModel(LlamaModel):
    config_class = NovelConfig

    def forward(self, inputs_embeds=None, past_key_values=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(kwargs.pop("input_ids"))
        kwargs.pop("input_ids", None)
        return super().forward(inputs_embeds=inputs_embeds * 1.0, past_key_values=past_key_values, **kwargs)

class NovelForCausalLM(LlamaForCausalLM):
    config_class = NovelConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = NovelModel(config)
        self.post_init()
"""


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where Transformers copies the code before it runs it. Read from the environment at import, which is over."""
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama that says to be of a family that only its own code knows."""
    folder = make_checkpoint(tmp_path / "model", num_blocks=3)
    (folder / "config_code.py").write_text(CONFIG)
    (folder / "model_code.py").write_text(MODEL)
    names = {
        "AutoConfig": "config_code.NovelConfig",
        "AutoModel": "model_code.NovelModel",
        "AutoModelForCausalLM": "model_code.NovelForCausalLM",
    }
    edit_config(folder, model_type="novel", auto_map=names)
    return folder


def test_code_is_run_only_if_it_is_trusted(folder: Path) -> None:
    (folder / "config_code.py").write_text("raise RuntimeError('run')")
    with pytest.raises(
        UnsupportedModelError, match=r"code of its own \(novel\).*say so with --trust-remote-code"
    ) as raised:
        Checkpoint.open(folder)
    assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match=r"can't be read: RuntimeError: run"):
        Checkpoint.open(folder, trust_remote_code=True)


def test_a_family_of_its_own_code_is_the_local_model(folder: Path) -> None:
    local = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    checkpoint = Checkpoint.open(folder, trust_remote_code=True)
    spans = [load_span(checkpoint, 0, 1), load_span(checkpoint, 1, 3)]
    assert type(spans[0].model).__name__ == "NovelModel"
    ids = torch.arange(3, 13)[None]
    with torch.inference_mode():
        states = local(ids, output_hidden_states=True).hidden_states
        assert torch.equal(local.model.norm(spans[1](spans[0](states[0]))), states[3])


def test_code_comes_from_the_hub_like_the_rest(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, monkeypatch) as hub:
        with pytest.raises(UnsupportedModelError, match="code of its own"):
            Checkpoint.open(NAME, cache_dir=tmp_path / "hub")
        assert not [file for file, _ in hub.fetched if file.endswith(".py")]
        checkpoint = Checkpoint.open(NAME, cache_dir=tmp_path / "hub", trust_remote_code=True)
        assert load_span(checkpoint, 1, 2).num_blocks == 1


def test_families_that_transformers_knows_run_its_code_even_then(folder: Path) -> None:
    edit_config(folder, model_type="llama")
    (folder / "config_code.py").write_text("raise RuntimeError('run')")
    checkpoint = Checkpoint.open(folder, trust_remote_code=True)
    assert type(load_span(checkpoint, 0, 1).model).__name__ == "LlamaModel"
