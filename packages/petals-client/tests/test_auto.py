"""Names and options of loading, checked before any server is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig

import petals_client
from petals_client.auto import FAMILY_CLASSES, load_model
from petals_client.options import ClientOptions
from petals_core.addresses import Address
from petals_core.errors import ConfigurationError, InvalidRequestError, NoPeersError

NOBODY = "127.0.0.1:9"


def test_names_of_earlier_versions() -> None:
    for family in ("Bloom", "Llama", "Falcon", "Mixtral"):
        for kind in ("Model", "ForCausalLM", "ForSequenceClassification"):
            assert getattr(petals_client, f"Distributed{family}{kind}") is FAMILY_CLASSES[f"Distributed{family}{kind}"]
    with pytest.raises(AttributeError, match="DistributedLlamaForCausalLM"):
        petals_client.DistributedGPT5  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        petals_client.nonsense  # noqa: B018
    assert set(petals_client.__all__) <= set(dir(petals_client))
    for name in petals_client.__all__:
        assert getattr(petals_client, name) is not None


def test_importing_costs_next_to_nothing() -> None:
    code = (
        "import sys, petals_client; "
        "print([name for name in ('torch', 'transformers', 'kademlia', 'typer', 'accelerate') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_another_family_is_refused(swarm: Any) -> None:
    with pytest.raises(ConfigurationError, match="llama model: load it with AutoDistributedModelForCausalLM instead"):
        petals_client.DistributedBloomForCausalLM.from_pretrained(swarm.folder, initial_peers=[NOBODY])


def test_unknown_options_are_refused_and_useless_ones_taken(swarm: Any) -> None:
    auto = petals_client.AutoDistributedModelForCausalLM
    with pytest.raises(ConfigurationError, match="no option load_in_3bit"):
        auto.from_pretrained(swarm.folder, initial_peers=[NOBODY], load_in_3bit=True)
    options = ClientOptions.make(initial_peers=[NOBODY], connect_timeout_s=0.2)
    with pytest.raises(NoPeersError, match=r"127\.0\.0\.1:9"):
        auto.from_pretrained(swarm.folder, initial_peers=[NOBODY], low_cpu_mem_usage=True, options=options)
    with pytest.raises(InvalidRequestError, match="from_pretrained"):
        auto()


def test_configs(swarm: Any) -> None:
    config = petals_client.AutoDistributedConfig.from_pretrained(swarm.folder)
    assert config.num_hidden_layers == 3


def test_a_head_that_transformers_does_not_have(swarm: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"no such class for mamba models: load it with AutoDistributedModel$"):
        load_model(
            swarm.checkpoint,
            mapping="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
            chain=swarm.chain,
            config=MambaConfig(),
        )


def test_options(tmp_path: Path) -> None:
    options = ClientOptions.make(initial_peers=["192.0.2.1:1, 192.0.2.2:2", Address("192.0.2.1", 1)])
    assert options.initial_peers == (Address("192.0.2.1", 1), Address("192.0.2.2", 2))
    assert ClientOptions.make(initial_peers="192.0.2.1:1").initial_peers == (Address("192.0.2.1", 1),)
    for peers in ([], [" "]):
        with pytest.raises(ConfigurationError, match="no initial peers"):
            ClientOptions.make(initial_peers=peers)
    with pytest.raises(ConfigurationError, match="can't be read"):
        ClientOptions.make(initial_peers=[NOBODY], swarm_key_file=tmp_path / "none")
