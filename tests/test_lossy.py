"""What is not exact is asked for, or told, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from petals_client import AutoDistributedModelForCausalLM, ClientOptions
from petals_core.errors import ConfigurationError, MissingBlocksError
from petals_server.testing import InProcessSwarm

IDS = torch.arange(3, 19).view(2, 8)
CUTS = ((0, 2), (2, 4), (4, 6))


@pytest.fixture
def folder(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama")


@pytest.fixture
def mixed(folder: Path, new_swarm: Callable[[], InProcessSwarm]) -> InProcessSwarm:
    """Blocks 2:4 are held by a server in nf4 alone."""
    swarm = new_swarm()
    for (start, end), quantization in zip(CUTS, ("none", "nf4", "none"), strict=True):
        swarm.add(folder, start, end, quantization=quantization)
    return swarm


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
        return result


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("petals_client")]


def connect(folder: Path, swarm: InProcessSwarm, **arguments: Any) -> Any:
    return AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=swarm.initial_peers, **arguments)


def test_quantized_servers_are_used_and_told_once(
    folder: Path, mixed: InProcessSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    local = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model = connect(folder, mixed)
    difference = (logits(model) - logits(local)).norm() / logits(local).norm()
    assert 0.001 < difference < 0.8
    logits(model)
    model.close()
    (warning,) = warnings(caplog)
    assert "computes with nf4 weights and this model with float32: results differ slightly" in warning


def test_what_is_not_allowed_is_not_used(folder: Path, mixed: InProcessSwarm, caplog: pytest.LogCaptureFixture) -> None:
    strict = connect(folder, mixed, allowed_quantization=["none"], allowed_dtypes=[torch.float32])
    with pytest.raises(
        MissingBlocksError,
        match=r"blocks 2:4 of .* only from servers with nf4 weights, which this client's options exclude",
    ):
        logits(strict)
    narrow = connect(folder, mixed, allowed_dtypes="bfloat16")
    with pytest.raises(MissingBlocksError, match=r"blocks 0:6 of .* only from servers with float32, which"):
        logits(narrow)
    mixed.add(folder, 1, 5)
    local = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (logits(strict) - logits(local)).abs().max() <= 1e-5 * max(1.0, float(logits(local).abs().max()))
    assert not warnings(caplog)
    strict.close()
    narrow.close()


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("allowed_quantization", ("int4",), "none, int8, nf4"),
        ("allowed_quantization", (), "none, int8, nf4"),
        ("allowed_dtypes", ("float8",), "float64, float32"),
        ("activation_codec", "int4", "float32, float16, bfloat16, int8"),
    ],
)
def test_options_that_are_none(name: str, value: Any, known: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} .* {known}"):
        ClientOptions.make(initial_peers=["127.0.0.1:9"], **{name: value})


def test_hidden_states_in_int8_when_asked_for(folder: Path, shared_swarm: Callable[[str], InProcessSwarm]) -> None:
    swarm = shared_swarm("llama")
    exact = connect(folder, swarm)
    options = ClientOptions.make(initial_peers=swarm.initial_peers, activation_codec="int8", compression="none")
    lossy = connect(folder, swarm, options=options)
    expected = logits(exact)
    difference = float((logits(lossy) - expected).norm() / expected.norm())
    assert 0.001 < difference < 0.1
    with torch.inference_mode(), lossy.inference_session(max_length=8):
        steps = [lossy(IDS[:, :5]).logits, *(lossy(IDS[:, i : i + 1]).logits for i in range(5, 8))]
    difference = float((torch.cat(steps, dim=1) - expected).norm() / expected.norm())
    assert 0.001 < difference < 0.1
    exact.close()
    lossy.close()


def test_a_checkpoint_that_is_stored_quantized_is_the_local_model(
    folder: Path, new_swarm: Callable[[], InProcessSwarm], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}
    ).eval()
    stored.save_pretrained(tmp_path)
    swarm = new_swarm()
    for start, end in CUTS:
        swarm.add(tmp_path, start, end)
    assert {server.model.quantization for server in swarm.servers} == {"nf4"}
    model = connect(tmp_path, swarm, allowed_quantization=["nf4"])
    # The kernel rounds to bfloat16, so that rows computed alone or in a batch may differ by one step of it.
    assert (logits(model) - logits(stored)).abs().max() <= 0.01 * logits(stored).abs().max()
    assert not warnings(caplog)
    model.close()
