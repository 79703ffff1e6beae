"""LoRA adapters in PEFT's format on servers give what PEFT gives with the local model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AutoModelForCausalLM

from petals_client import AutoDistributedModelForCausalLM
from petals_core.errors import ConfigurationError, InvalidRequestError, MissingAdapterError
from petals_server.testing import InProcessSwarm

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "mixtral": ["q_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
}
CUTS = ((0, 2), (2, 5), (5, 6))


def make_adapter(folder: Path, model: Path, family: str, seed: int = 0, **settings: Any) -> Path:
    """Train nothing, but let PEFT save matrices that change something."""
    base = AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM", **settings},
        fan_in_fan_out=family == "gpt2",
    )
    tuned = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3 / weight.shape[1] ** 0.5
    tuned.save_pretrained(folder)
    return folder


def batch(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 259, (rows, width), generator=torch.Generator().manual_seed(seed))


def local_with(model: Path, adapter: Path | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(model)
    return (base if adapter is None else peft.PeftModel.from_pretrained(base, adapter)).eval().requires_grad_(False)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert float(expected.norm()) > 0
    assert float((actual - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.fixture
def load() -> Iterator[Callable[..., Any]]:
    models: list[Any] = []

    def make(folder: Path, swarm: InProcessSwarm, auto: Any = AutoDistributedModelForCausalLM, **options: Any) -> Any:
        models.append(auto.from_pretrained(folder, initial_peers=swarm.initial_peers, **options))
        return models[-1]

    yield make
    for model in models:
        model.close()


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TARGETS)
def test_logits_tokens_and_gradients_are_those_of_peft(
    family: str,
    checkpoints: Callable[[str], Path],
    new_swarm: Callable[[], InProcessSwarm],
    load: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = checkpoints(family)
    of_block_1 = {"bloom": "h.1.self_attention", "gpt2": "h.1.attn"}.get(family, "layers.1.self_attn")
    pattern = {
        "rank_pattern": {TARGETS[family][0]: 2},
        "alpha_pattern": {f"{of_block_1}.{TARGETS[family][0]}": 3},
    }
    poems = make_adapter(tmp_path / "poems", model, family)
    prose = make_adapter(tmp_path / "prose", model, family, seed=1, use_rslora=True, **pattern)
    swarm = new_swarm()
    for start, end in CUTS:
        server = swarm.add(model, start, end, adapters=(str(poems), f"x={prose}"))
        assert [name.partition("@")[0] for name in server.model.adapters] == ["poems", "x"]
        assert all(set(adapter.blocks) == set(range(start, end)) for adapter in server.model.adapters.values())
    inputs = batch(2, 7)
    mask = torch.ones_like(inputs)
    mask[1, :3] = 0
    outputs = []
    distributed = load(model, swarm, active_adapter="poems")
    for name, folder in (("poems", poems), ("x", prose), (None, None)):
        local = local_with(model, folder)
        expected = local(inputs, attention_mask=mask).logits
        with distributed.remote_blocks.use_adapter(name):
            actual = distributed(inputs, attention_mask=mask).logits
            assert_same(actual[mask.bool()], expected[mask.bool()])
            tokens = distributed.generate(inputs, attention_mask=mask, max_new_tokens=6, do_sample=False)
            assert torch.equal(tokens, local.generate(inputs, attention_mask=mask, max_new_tokens=6, do_sample=False))
            gradients = []
            for each in (distributed, local):
                embeds = each.get_input_embeddings()(inputs).detach().requires_grad_()
                logits = each(inputs_embeds=embeds).logits
                loss = F.cross_entropy(logits.flatten(0, 1), inputs.flatten())
                gradients.append(torch.autograd.grad(loss, embeds)[0])
            assert_same(*gradients)
        outputs.append(expected[mask.bool()])
    assert not any(torch.allclose(a, b, rtol=0.01) for a, b in zip(outputs, [*outputs[1:], outputs[0]], strict=True))


def test_several_adapters_at_once(
    checkpoints: Callable[[str], Path],
    new_swarm: Callable[[], InProcessSwarm],
    load: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Clients with different adapters, with a trained one of their own, and with none share the servers' turns."""
    model = checkpoints("llama")
    folders = {str(seed): make_adapter(tmp_path / str(seed), model, "llama", seed=seed) for seed in range(2)}
    swarm = new_swarm()
    for start, end in ((0, 3), (3, 6)):
        swarm.add(model, start, end, adapters=tuple(map(str, folders.values())))
    shared = load(model, swarm)
    own = load(model, swarm, tuned=folders["1"])
    wanted = [("0", shared, 4), ("1", shared, 6), (None, shared, 5), ("0", shared, 5), ("own", own, 6)]
    tokens: dict[int, Tensor] = {}

    def generate(number: int) -> None:
        name, distributed, length = wanted[number]
        with distributed.remote_blocks.use_adapter(None if name == "own" else name):
            tokens[number] = distributed.generate(
                batch(2, length, seed=number), max_new_tokens=12, min_new_tokens=12, do_sample=False
            )

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (name, _, length) in enumerate(wanted):
        local = local_with(model, folders["1"] if name == "own" else None if name is None else folders[name])
        inputs = batch(2, length, seed=number)
        assert torch.equal(
            tokens[number], local.generate(inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        )


# --- what is missing or does not fit ----------------------------------------------------------------------------------


def test_a_missing_adapter(
    checkpoints: Callable[[str], Path],
    new_swarm: Callable[[], InProcessSwarm],
    load: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = checkpoints("llama")
    poems = make_adapter(tmp_path / "poems", model, "llama")
    other = make_adapter(tmp_path / "other", model, "llama", seed=1)
    swarm = new_swarm()
    first = swarm.add(model, 0, 4, adapters=(str(poems),))
    swarm.add(model, 4, 6)
    with pytest.raises(MissingAdapterError) as caught:
        load(model, swarm, active_adapter="poems")
    (name,) = first.model.adapters
    assert "blocks 4:6" in caught.value.message
    assert f"{first.peer_id.short} (0:4): {name}" in caught.value.message
    # Two servers with different adapters of one name never compute for the same request.
    swarm.add(model, 4, 6, adapters=(f"poems={other}",))
    with pytest.raises(MissingAdapterError, match="different adapters called poems"):
        load(model, swarm, active_adapter="poems")
    swarm.add(model, 4, 6, adapters=(str(poems),))
    model_with = load(model, swarm, active_adapter=name)
    assert_same(model_with(batch(1, 5)).logits, local_with(model, poems)(batch(1, 5)).logits)


def test_a_server_refuses_what_does_not_fit(
    checkpoints: Callable[[str], Path], new_swarm: Callable[[], InProcessSwarm], tmp_path: Path
) -> None:
    bloom = make_adapter(tmp_path / "bloom", checkpoints("bloom"), "bloom")
    with pytest.raises(ConfigurationError, match=r"does not fit this model: it changes no blocks.*tiny-bloom"):
        new_swarm().add(checkpoints("llama"), 0, 1, adapters=(str(bloom),))


# --- PEFT on the client -----------------------------------------------------------------------------------------------


def test_peft_adapts_the_clients_own_layers(
    checkpoints: Callable[[str], Path], shared_swarm: Callable[[str], InProcessSwarm], load: Callable[..., Any]
) -> None:
    folder = checkpoints("llama")
    inputs = batch(2, 6)
    gradients = []
    for base in (load(folder, shared_swarm("llama")), AutoModelForCausalLM.from_pretrained(folder)):
        config = peft.LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
        model(input_ids=inputs, labels=inputs).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert len(gradients[0]) == 4
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_same(gradient, gradients[1][name])


def test_peft_on_the_blocks_is_refused(
    checkpoints: Callable[[str], Path], shared_swarm: Callable[[str], InProcessSwarm], load: Callable[..., Any]
) -> None:
    model = load(checkpoints("llama"), shared_swarm("llama"))
    with pytest.raises(ValueError, match=r"computed by servers.*tuning_mode='lora'"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InvalidRequestError, match="tuning_mode='lora'"):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
