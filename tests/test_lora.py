"""LoRA of remote blocks, trained through a swarm, is what PEFT trains with the local model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from petals_client import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification, ClientOptions
from petals_core.errors import ConfigurationError, InvalidRequestError, OverloadedError
from petals_core.testing.factories import make_checkpoint
from petals_server.config import ServerLimits
from petals_server.testing import InProcessSwarm, until

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "mixtral": ["q_proj", "o_proj"],
    "demo": ["q_proj", "v_proj", "gate_proj"],
}
RANK, ALPHA = 3, 12


@pytest.fixture
def load(checkpoints: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """A distributed model that trains matrices, which begin with values that change something."""
    models: list[Any] = []

    def make(family: str, swarm: InProcessSwarm, auto: Any = AutoDistributedModelForCausalLM, **options: Any) -> Any:
        settings = {name: options.pop(name) for name in ("gradient_encoding", "step_timeout_s") if name in options}
        options = {"lora_rank": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS[family], **options}
        if "tuned" in options:
            options = {"tuned": options["tuned"]}
        else:
            options["tuning_mode"] = "lora"
        model = auto.from_pretrained(
            checkpoints(family),
            initial_peers=[],
            dtype=torch.float32,
            options=ClientOptions.make(initial_peers=swarm.initial_peers, **settings),
            **options,
        )
        models.append(model)
        if "tuned" not in options:
            fill(model.tuned_adapter)
        return model

    yield make
    for model in models:
        model.close()


def fill(module: torch.nn.Module, seed: int = 0) -> None:
    """Values by which outputs change, the same for matrices of the same layer."""
    generator = torch.Generator().manual_seed(seed)
    for _, weight in sorted((name, weight) for name, weight in module.named_parameters() if "lora_" in name):
        weight.data = torch.randn(weight.shape, generator=generator).to(weight) * 0.2 / weight.shape[1] ** 0.5


def local_twin(folder: Path, family: str, model: Any, auto: Any = AutoModelForCausalLM) -> tuple[Any, dict[str, Any]]:
    """PEFT on the local model with the same values, and its matrices by the names that they have in ``model``."""
    base = auto.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[family], task_type="CAUSAL_LM")
    twin = peft.get_peft_model(base, config).eval()
    matrices = {}
    for index, path, own in model.tuned_adapter.layers():
        for letter in "AB":
            name = next(
                name for name, _ in twin.named_parameters() if f".{index}.{path}.lora_{letter}.default.weight" in name
            )
            weight = twin.get_parameter(name)
            weight.data = getattr(own, f"lora_{letter}").detach().clone()
            matrices[f"{index}.{path}.lora_{letter}"] = weight
    return twin, matrices


def batch(rows: int, width: int, seed: int = 0, vocabulary: int = 259) -> Tensor:
    return torch.randint(3, vocabulary, (rows, width), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    assert float(expected.norm()) > 0
    assert float((actual - expected).norm()) <= 1e-5 * float(expected.norm())


def assert_same_gradients(model: Any, matrices: dict[str, Any]) -> None:
    """The norm of the difference is at most 1e-5 of the norm, for the matrices of each layer."""
    own = dict(model.tuned_adapter.named_parameters())
    assert own.keys() == matrices.keys()
    for name, weight in own.items():
        assert_same(weight.grad, matrices[name].grad)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TARGETS)
def test_gradients_of_a_padded_batch(
    family: str, checkpoints: Callable[[str], Path], shared_swarm: Callable[[str], InProcessSwarm], load: Any
) -> None:
    model = load(family, shared_swarm(family))
    assert {id(weight) for weight in model.parameters()} == {id(weight) for weight in model.tuned_adapter.parameters()}
    twin, matrices = local_twin(checkpoints(family), family, model)
    inputs = batch(3, 8)
    mask = torch.arange(8) >= torch.tensor([0, 5, 3])[:, None]
    for each in (model, twin):
        logits = each(input_ids=inputs, attention_mask=mask.long()).logits[mask]
        F.cross_entropy(logits, inputs[mask]).backward()
    assert_same_gradients(model, matrices)


def test_gradients_of_a_slice(
    checkpoints: Callable[[str], Path], shared_swarm: Callable[[str], InProcessSwarm], load: Any
) -> None:
    model = load("llama", shared_swarm("llama"))
    twin, matrices = local_twin(checkpoints("llama"), "llama", model)
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    model.remote_blocks[2:5](hidden).square().sum().backward()
    decoder = twin.get_base_model().model
    positions = torch.arange(5)[None]
    for block in decoder.layers[2:5]:
        hidden = block(hidden, position_embeddings=decoder.rotary_emb(hidden, positions), position_ids=positions)
    hidden.square().sum().backward()
    for name, weight in model.tuned_adapter.named_parameters():
        assert weight.grad is not None
        if name[0] in "234":
            assert_same(weight.grad, matrices[name].grad)
        else:
            assert not weight.grad.any()


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(ServerLimits(), id="kept graphs"),
        pytest.param(ServerLimits(max_graph_s=0.0), id="expired graphs"),
        pytest.param(ServerLimits(max_graph_bytes=0, max_turn_tokens=8), id="block by block, row by row"),
    ],
)
def test_training_steps_are_those_of_peft(
    checkpoints: Callable[[str], Path], new_swarm: Any, load: Any, limits: ServerLimits
) -> None:
    """Values change with each step, and a server that comes later is sent those of that moment."""
    swarm = new_swarm()
    for start, end in ((0, 3), (3, 6)):
        swarm.add(checkpoints("llama"), start, end, limits=limits)
    model = load("llama", swarm)
    twin, _ = local_twin(checkpoints("llama"), "llama", model)
    inputs = batch(2, 8)
    losses: list[list[float]] = []
    for each in (model, twin):
        optimizer = torch.optim.AdamW([weight for weight in each.parameters() if weight.requires_grad], lr=0.02)
        losses.append([])
        for step in range(5):
            loss = each(input_ids=inputs, labels=inputs).loss
            if each is model and step == 2:  # in the midst of a step
                swarm.add(checkpoints("llama"), 0, 6, limits=limits)
                swarm.remove(swarm.servers[1])
                swarm.remove(swarm.servers[0])
                model.remote_blocks.chain.run(lambda known: known.directory.refresh())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < 0.9 * losses[0][0]
    (server,) = swarm.servers
    assert len(server.holding.handler.training.sessions) == 1
    # What was trained also generates, and a session goes on with the values that it began with.
    with model.inference_session(max_length=16):
        tokens = model.generate(inputs[:1], max_new_tokens=2, do_sample=False)
        expected = twin.generate(inputs[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
        fill(model.tuned_adapter, seed=1)
        assert torch.equal(model.generate(None, max_new_tokens=4, min_new_tokens=4, do_sample=False), expected[:, -4:])
    assert tokens.shape == (1, 10)


def test_a_copy_of_the_model_has_values_of_its_own(
    checkpoints: Callable[[str], Path], shared_swarm: Callable[[str], InProcessSwarm], load: Any
) -> None:
    model = load("llama", shared_swarm("llama"))
    twin = copy.deepcopy(model)
    fill(twin.tuned_adapter, seed=1)
    with torch.no_grad():
        before = model(batch(1, 4)).logits
        assert not torch.allclose(twin(batch(1, 4)).logits, before, rtol=1e-2)
        assert_same(model(batch(1, 4)).logits, before)


def test_lossy_gradients_only_where_asked(
    checkpoints: Callable[[str], Path], shared_swarm: Callable[[str], InProcessSwarm], load: Any
) -> None:
    model = load("llama", shared_swarm("llama"), gradient_encoding="int8")
    twin, matrices = local_twin(checkpoints("llama"), "llama", model)
    for each in (model, twin):
        each(input_ids=batch(2, 8), labels=batch(2, 8)).loss.backward()
    for name, weight in model.tuned_adapter.named_parameters():
        assert weight.grad is not None
        error = float((weight.grad - matrices[name].grad).norm())
        assert 0 < error < 0.1 * float(matrices[name].grad.norm())


def test_gradcheck(new_swarm: Any, tmp_path: Path) -> None:
    # Of a family that computes in no other dtype on its way, as llama's norms do.
    folder = make_checkpoint(tmp_path / "tiny", "gpt2", num_blocks=2, hidden_size=8, dtype=torch.float64)
    swarm = new_swarm()
    swarm.add(folder, 0, 1)
    swarm.add(folder, 1, 2)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=swarm.initial_peers, tuning_mode="lora", lora_rank=1, target_modules="c_attn"
    )
    try:
        blocks = model.remote_blocks
        hidden = torch.randn(1, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        fill(model.tuned_adapter)
        names, weights = zip(*blocks.named_parameters(), strict=True)

        def run(*values: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(blocks, dict(zip(names, values, strict=True)), (hidden,))
            return output

        assert {weight.dtype for weight in weights} == {torch.float64}
        assert torch.autograd.gradcheck(run, weights)
    finally:
        model.close()


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_was_trained_is_loaded_by_peft_by_servers_and_again(
    checkpoints: Callable[[str], Path], new_swarm: Any, load: Any, tmp_path: Path
) -> None:
    folder = checkpoints("llama")
    swarm = new_swarm()
    swarm.add(folder, 0, 6)
    torch.manual_seed(0)
    model = load("llama", swarm, AutoDistributedModelForSequenceClassification, num_labels=3)
    model.config.pad_token_id = 0
    assert model.score.weight.requires_grad  # the checkpoint has no classifier, so it trains
    inputs = batch(2, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=inputs, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    expected = model(inputs).logits.detach()
    model.save_pretrained(tmp_path / "trained")
    assert {path.name for path in (tmp_path / "trained").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    base.config.pad_token_id = 0
    assert_same(peft.PeftModel.from_pretrained(base, tmp_path / "trained").eval()(inputs).logits.detach(), expected)

    server = swarm.add(folder, 0, 6, adapters=(f"mine={tmp_path / 'trained'}",))
    assert [name.partition("@")[0] for name in server.model.adapters] == ["mine"]
    user = AutoDistributedModelForSequenceClassification.from_pretrained(
        folder,
        initial_peers=swarm.initial_peers,
        num_labels=3,
        active_adapter="mine",
        tuned=tmp_path / "trained",
    )
    user.config.pad_token_id = 0
    try:
        assert user.tuned_adapter is None
        assert_same(user(inputs).logits.detach(), expected)
    finally:
        user.close()


def test_training_goes_on_from_files(
    checkpoints: Callable[[str], Path], shared_swarm: Callable[[str], InProcessSwarm], load: Any, tmp_path: Path
) -> None:
    swarm = shared_swarm("llama")
    model = load("llama", swarm)
    twin, _ = local_twin(checkpoints("llama"), "llama", model)
    twin.save_pretrained(tmp_path / "by-peft")
    model.save_pretrained(tmp_path / "ours")
    for name in ("ours", "by-peft"):
        again = load("llama", swarm, tuned=tmp_path / name)
        assert again.tuned_adapter.layout.scaling == ALPHA / RANK
        for actual, expected in zip(again.parameters(), model.parameters(), strict=True):
            assert torch.equal(actual, expected)


def test_trainer_resumes(shared_swarm: Callable[[str], InProcessSwarm], load: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in batch(8, 6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        train_sampling_strategy="sequential",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    models = [load("llama", shared_swarm("llama")) for _ in range(2)]
    Trainer(model=models[0], args=arguments, train_dataset=rows).train()
    Trainer(model=models[1], args=arguments, train_dataset=rows).train(str(tmp_path / "checkpoint-2"))
    for actual, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.allclose(actual, expected, atol=1e-5)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_modules": ["q_prog"]}, "'q_prog', which is no linear layer of the blocks: there are down_proj"),
        ({"lora_rank": 257}, "choose 1 to 256"),
        ({"pre_seq_len": 3}, "no prompts"),
    ],
)
def test_wrong_settings(
    shared_swarm: Callable[[str], InProcessSwarm], load: Any, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        load("llama", shared_swarm("llama"), **options)


def test_values_over_a_servers_limits(checkpoints: Callable[[str], Path], new_swarm: Any, load: Any) -> None:
    swarm = new_swarm()
    swarm.add(checkpoints("llama"), 0, 6, limits=ServerLimits(max_tuning_session_bytes=1000))
    model = load("llama", swarm)
    with pytest.raises(InvalidRequestError, match="smaller rank or fewer target_modules"):
        model(batch(1, 4))
    swarm = new_swarm()
    num_bytes = sum(weight.nbytes for weight in model.parameters())
    swarm.add(checkpoints("llama"), 0, 6, limits=ServerLimits(max_tuning_bytes=2 * num_bytes, retry_after_s=0.01))
    models = [load("llama", swarm) for _ in range(3)]
    for model in models[:2]:
        model(batch(1, 4))
    with pytest.raises(OverloadedError, match="no memory is left for tuning sessions"):
        models[2](batch(1, 4))
    models[0].close()
    sessions = swarm.servers[0].holding.handler.training.sessions
    swarm.run(until(lambda: len(sessions) == 1))  # the server hears of it
    models[2](batch(1, 4))
    assert sessions.num_bytes == 2 * num_bytes
