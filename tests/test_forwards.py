"""Forward passes beside those of the local model: losses, hidden states, heads, and names of earlier versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import petals_client
from petals_core.errors import ConfigurationError

TOKENS = torch.randint(3, 259, (3, 8), generator=torch.Generator().manual_seed(0))
LEFT = torch.arange(8)[None] >= torch.tensor([[0], [5], [2]])
RIGHT = LEFT.flip(1)


@pytest.fixture(scope="module", params=["llama", "bloom", "demo"])
def pair(request: pytest.FixtureRequest, pairs: Any) -> Any:
    return pairs(request.param)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 1e-5 * max(1.0, float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= limit


@torch.no_grad()
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_loss_of_padded_rows(pair: Any, mask: torch.Tensor) -> None:
    # A row's first token behind pads would be predicted from what stands at a pad, which nobody computes here.
    is_predicted = mask & mask.roll(1, dims=1)
    labels = TOKENS.masked_fill(~is_predicted, -100)
    actual, expected = (each(TOKENS * mask, attention_mask=mask.long(), labels=labels) for each in pair.both)
    assert_close(actual.loss, expected.loss)
    assert_close(actual.logits[mask], expected.logits[mask])


@torch.no_grad()
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_hidden_states_of_all_blocks(pair: Any, mask: torch.Tensor) -> None:
    actual, expected = (
        each(TOKENS * mask, attention_mask=mask.long(), output_hidden_states=True).hidden_states for each in pair.both
    )
    assert len(actual) == len(expected) == pair.local.config.num_hidden_layers + 1
    for one, other in zip(actual, expected, strict=True):
        assert_close(one[mask], other[mask])


@torch.no_grad()
def test_some_logits(pair: Any) -> None:
    for kept in (1, 3, torch.tensor([0, 4])):
        actual, expected = (each(TOKENS, logits_to_keep=kept).logits for each in pair.both)
        assert actual.shape == expected.shape
        assert_close(actual, expected)


@torch.no_grad()
def test_embeddings_and_positions(pair: Any) -> None:
    embeddings = pair.local.get_input_embeddings()(TOKENS)
    options: dict[str, Any] = {"inputs_embeds": embeddings}
    if pair.local.config.model_type != "bloom":  # which has no positions
        options["position_ids"] = torch.tensor([[0, 1, 2, 7, 8, 9, 3, 4], [4, 5, 6, 7, 8, 9, 10, 11], [1] * 8])
    actual, expected = (each(**options).logits for each in pair.both)
    assert_close(actual, expected)


@torch.no_grad()
def test_tuples_as_results(pair: Any) -> None:
    actual, expected = (each(TOKENS, return_dict=False, use_cache=False) for each in pair.both)
    assert len(actual) == len(expected) == 1
    assert_close(actual[0], expected[0])


# --- other kinds of models --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bloom", "demo"])
def test_base_models(pairs: Any, family: str) -> None:
    pair = pairs(family, "Model")
    mask = LEFT.long()
    actual, expected = (each(TOKENS * mask, attention_mask=mask, output_hidden_states=True) for each in pair.both)
    assert type(pair.model).__name__ == type(pair.local).__name__
    assert_close(actual.last_hidden_state[LEFT], expected.last_hidden_state[LEFT])
    assert_close(actual.hidden_states[2][LEFT], expected.hidden_states[2][LEFT])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bloom", "demo"])
def test_classifiers(pairs: Any, family: str) -> None:
    """A checkpoint without a classifier's head: it is made anew, and here copied to the local model."""
    pair = pairs(family, "ModelForSequenceClassification")
    pair.local.score.load_state_dict(pair.model.score.state_dict())
    labels = torch.tensor([1, 0, 1])
    for each in pair.both:
        each.config.pad_token_id = 0
    for mask in (LEFT, RIGHT):
        tokens = TOKENS * mask
        actual, expected = (each(tokens, attention_mask=mask.long(), labels=labels) for each in pair.both)
        assert_close(actual.logits, expected.logits)
        assert_close(actual.loss, expected.loss)


@torch.no_grad()
def test_labels_of_a_classifier(pairs: Any) -> None:
    pair = pairs("llama")
    model = petals_client.AutoDistributedModelForSequenceClassification.from_pretrained(
        pair.folder, initial_peers=pair.swarm.initial_peers, num_labels=5
    )
    try:
        assert model(TOKENS[:1]).logits.shape == (1, 5)
    finally:
        model.close()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("Bloom", "Model"),
        ("Falcon", "ForCausalLM"),
        ("Llama", "ForSequenceClassification"),
        ("Mixtral", "ForCausalLM"),
    ],
)
def test_names_of_earlier_versions(pairs: Any, checkpoints: Any, family: str, kind: str) -> None:
    """They give the class of Transformers with remote blocks, for which no server has to be there yet."""
    loader = getattr(petals_client, f"Distributed{family}{kind}")
    model = loader.from_pretrained(checkpoints(family.lower()), initial_peers=pairs("llama").swarm.initial_peers)
    try:
        assert isinstance(model, getattr(transformers, f"{family}{kind}"))
        assert len(model.remote_blocks) == 6
    finally:
        model.close()


def test_configs(checkpoints: Any) -> None:
    config = petals_client.AutoDistributedConfig.from_pretrained(checkpoints("bloom"))
    expected = transformers.AutoConfig.from_pretrained(checkpoints("bloom"))
    assert type(config) is type(expected)
    assert config.to_diff_dict() | {"_name_or_path": ""} == expected.to_diff_dict() | {"_name_or_path": ""}


def test_where_the_clients_part_is(pairs: Any) -> None:
    pair = pairs("llama")
    load = petals_client.AutoDistributedModelForCausalLM.from_pretrained
    for device_map in (torch.device("cpu"), {"model.embed_tokens": "cpu", "lm_head": "cpu"}):
        model = load(pair.folder, initial_peers=pair.swarm.initial_peers, device_map=device_map)
        try:
            assert model.device.type == "cpu"
        finally:
            model.close()
    with pytest.raises(ConfigurationError, match="give one device"):
        load(pair.folder, initial_peers=pair.swarm.initial_peers, device_map={"a": "cpu", "b": "meta"})
