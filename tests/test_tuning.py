"""Prompt tuning through a swarm gives what it gives with the local model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AutoModelForCausalLM

from petals_client import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_core.errors import CheckpointError, ConfigurationError, InvalidRequestError
from petals_core.models.checkpoint import Checkpoint
from petals_core.models.span import load_span

FAMILIES = ("llama", "bloom", "gpt2")
NUM_PROMPTS = 3


@pytest.fixture
def load(shared_swarm: Any, checkpoints: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Load a distributed model of a family."""
    models: list[Any] = []

    def make(family: str = "llama", auto: Any = AutoDistributedModelForCausalLM, **options: Any) -> Any:
        folder = options.pop("folder", checkpoints(family))
        models.append(auto.from_pretrained(folder, initial_peers=shared_swarm(family).initial_peers, **options))
        return models[-1]

    yield make
    for model in models:
        model.close()


def batch(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 259, (rows, width), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert float(expected.norm()) > 0
    assert float((actual - expected).norm()) <= 1e-5 * float(expected.norm())


def with_prompts(local: Any, prompts: Tensor, inputs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """A batch of the local model with embeddings of prompts before every row, pads behind them, as PEFT has it."""
    num_rows = len(inputs)
    embeds = local.get_input_embeddings()(inputs)
    return {
        "inputs_embeds": torch.cat([prompts.expand(num_rows, -1, -1), embeds], dim=1),
        "attention_mask": torch.cat([torch.ones(num_rows, NUM_PROMPTS, dtype=mask.dtype), mask], dim=1),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_ptune_is_that_of_the_local_model(
    load: Callable[..., Any], checkpoints: Callable[[str], Path], family: str
) -> None:
    model = load(family, tuning_mode="ptune", pre_seq_len=NUM_PROMPTS)
    local = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
    weight = model.prompts.input.detach().clone().requires_grad_()
    inputs = batch(3, 7)
    mask = (torch.arange(7) >= 7 - torch.tensor([[7], [4], [6]])).long()
    actual = model(inputs, attention_mask=mask).logits
    expected = local(**with_prompts(local, weight, inputs, mask)).logits[:, NUM_PROMPTS:]
    chosen = mask.bool()
    assert_same(actual[chosen].detach(), expected[chosen].detach())
    (gradient,) = torch.autograd.grad(F.cross_entropy(actual[chosen], inputs[chosen]), model.prompts.input)
    (wanted,) = torch.autograd.grad(F.cross_entropy(expected[chosen], inputs[chosen]), weight)
    assert_same(gradient, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_tuned_prompts(
    load: Callable[..., Any], checkpoints: Callable[[str], Path], family: str
) -> None:
    model = load(family, tuning_mode="ptune", pre_seq_len=NUM_PROMPTS)
    local = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
    inputs = batch(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompted = with_prompts(local, model.prompts.input.detach(), inputs, torch.ones_like(inputs))
    expected = torch.cat([inputs, local.generate(**prompted, **options)], dim=1)
    assert torch.equal(model.generate(inputs, **options), expected)
    with model.inference_session(max_length=16):
        assert torch.equal(model.generate(inputs, **{**options, "max_new_tokens": 3}), expected[:, :8])
        assert torch.equal(model.generate(**{**options, "max_new_tokens": 5}), expected[:, 8:])


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_is_what_the_forward_says(load: Callable[..., Any], family: str, mode: str) -> None:
    """Greedy tokens of a session, with pads, in beams and after a cut, against forwards without any."""
    torch.manual_seed(0)
    model = load(family, tuning_mode=mode, pre_seq_len=NUM_PROMPTS)
    if mode == "deep_ptune":
        torch.nn.init.normal_(model.prompts.deep)
    inputs = batch(2, 6)
    mask = (torch.arange(6) >= 6 - torch.tensor([[6], [2]])).long()
    inputs *= mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    output = model.generate(inputs, max_new_tokens=6, **options)
    with torch.no_grad():
        for row in range(2):
            tokens = inputs[row : row + 1][:, mask[row].bool()]
            for token in output[row, 6:]:
                assert model(tokens).logits[0, -1].argmax() == token
                tokens = torch.cat([tokens, token[None, None]], dim=1)
    with model.inference_session(max_length=20) as session:
        model.generate(inputs, max_new_tokens=2, **options)
        session.truncate(0)
        assert torch.equal(model.generate(inputs, max_new_tokens=6, **options), output)
    beams = model.generate(inputs, max_new_tokens=4, num_beams=3, **options)
    assert torch.equal(beams, model.generate(inputs, max_new_tokens=4, num_beams=3, use_cache=False, **options))
    without = load(family)
    assert not torch.equal(output, without.generate(inputs, max_new_tokens=6, **options))


def test_gradients_of_deep_ptune(load: Callable[..., Any], checkpoints: Callable[[str], Path]) -> None:
    model = load("llama", tuning_mode="deep_ptune", pre_seq_len=NUM_PROMPTS)
    torch.nn.init.normal_(model.prompts.deep)
    local = AutoModelForCausalLM.from_pretrained(checkpoints("llama")).eval()
    span = load_span(Checkpoint.open(checkpoints("llama")), 0, 6)
    inputs = batch(2, 5)
    prompts = [weight.detach().clone().requires_grad_() for weight in (model.prompts.input, model.prompts.deep)]
    hidden = torch.cat([prompts[0].expand(2, -1, -1), local.model.embed_tokens(inputs).detach()], dim=1)
    for index in range(6):
        head = hidden[:, :NUM_PROMPTS] + prompts[1][index]
        hidden = span.slice(index, index + 1)(torch.cat([head, hidden[:, NUM_PROMPTS:]], dim=1))
    expected = local.lm_head(local.model.norm(hidden[:, NUM_PROMPTS:]))
    wanted = torch.autograd.grad(F.cross_entropy(expected.flatten(0, 1), inputs.flatten()), prompts)
    loss = model(inputs, labels=inputs).loss
    assert loss.isfinite()
    actual = model(inputs).logits
    gradients = torch.autograd.grad(
        F.cross_entropy(actual.flatten(0, 1), inputs.flatten()), [model.prompts.input, model.prompts.deep]
    )
    for gradient, each in zip(gradients, wanted, strict=True):
        assert_same(gradient, each)


# --- what trains ------------------------------------------------------------------------------------------------------


def test_parameters_are_what_trains(load: Callable[..., Any]) -> None:
    model = load(auto=AutoDistributedModelForSequenceClassification, tuning_mode="deep_ptune", num_labels=3)
    assert {name for name, _ in model.named_parameters()} == {
        "score.weight",
        "model.tuned_prompts.input",
        "model.tuned_prompts.deep",
    }
    assert model.dtype is torch.float32
    assert not any(weight.requires_grad for weight in load().parameters())


def test_tuning_lowers_the_loss_and_is_saved(load: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load(tuning_mode="deep_ptune", pre_seq_len=4)
    inputs = batch(2, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(inputs, labels=inputs).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "tuned")
    card = json.loads((tmp_path / "tuned" / "petals_tuning.json").read_text())
    assert (card["tuning_mode"], card["pre_seq_len"], card["model_class"]) == ("deep_ptune", 4, "LlamaForCausalLM")
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {
        "README.md",
        "petals_tuning.json",
        "model.safetensors",
    }
    with torch.no_grad():
        expected = model(inputs).logits
        for again in (load(tuned=tmp_path / "tuned"), load(folder=tmp_path / "tuned")):
            assert torch.equal(again(inputs).logits, expected)
            assert len(list(again.parameters())) == 2


def test_a_trained_embedding_is_saved_without_prompts(load: Callable[..., Any], tmp_path: Path) -> None:
    model = load("bloom")
    with pytest.raises(InvalidRequestError, match="nothing of this model trains"):
        model.save_pretrained(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    weight = model.transformer.word_embeddings.weight
    weight.requires_grad = True
    weight.data.mul_(1.5)
    model.save_pretrained(tmp_path)
    again = load("bloom", folder=tmp_path)
    assert torch.equal(again.transformer.word_embeddings.weight, weight)
    assert again.transformer.word_embeddings.weight.requires_grad


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tuning_mode": "ia3"}, "none of ptune, deep_ptune"),
        ({"tuning_mode": "ptune", "pre_seq_len": 0}, "choose 1 to 4096"),
        ({"pre_seq_len": 4}, "needs a tuning_mode"),
    ],
)
def test_wrong_modes(load: Callable[..., Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        load(**options)


def test_weights_that_do_not_fit(load: Callable[..., Any], tmp_path: Path) -> None:
    load(tuning_mode="ptune", pre_seq_len=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="trained with LlamaForCausalLM"):
        load("gpt2", tuned=tmp_path)
    with pytest.raises(CheckpointError, match=r"no petals_tuning\.json"):
        load(tuned=tmp_path.parent)
    with pytest.raises(CheckpointError, match="there is no folder"):
        load(tuned=tmp_path / "missing")
    card = json.loads((tmp_path / "petals_tuning.json").read_text())
    for change, text in (({"format": 2}, "format 2"), ({"pre_seq_len": "4"}, "pre_seq_len is '4'")):
        (tmp_path / "petals_tuning.json").write_text(json.dumps(card | change))
        with pytest.raises(CheckpointError, match=text):
            load(tuned=tmp_path)


def test_what_is_pushed_is_what_is_loaded(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder: what is uploaded to a repository is copied there, and loaded from there."""

    class FolderHub:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> huggingface_hub.RepoUrl:
            assert private
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, folder_path: str, repo_id: str, commit_message: str) -> None:
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", FolderHub)
    model = load(tuning_mode="deep_ptune", pre_seq_len=3)
    assert model.push_to_hub("me/prompts", private=True, token="secret").endswith("/me/prompts")
    pushed = tmp_path / "me" / "prompts"
    assert {path.name for path in pushed.iterdir()} == {"README.md", "model.safetensors", "petals_tuning.json"}
    assert (pushed / "README.md").read_text().startswith("---\nbase_model: ")
    again = load(tuned=pushed)
    for actual, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(actual, expected)
