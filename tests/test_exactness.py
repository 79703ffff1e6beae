"""A swarm gives what the local model gives: logits within rounding, greedy tokens to the last one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from petals_client import AutoDistributedModel, AutoDistributedModelForCausalLM, ClientOptions

FAMILIES = ("llama", "bloom", "mixtral", "demo")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, pairs: Any) -> Any:
    """A distributed model and the same as Transformers loads it."""
    return pairs(request.param)


def batch(seed: int, rows: int, width: int) -> torch.Tensor:
    return torch.randint(3, 259, (rows, width), generator=torch.Generator().manual_seed(seed))


def pad(inputs: torch.Tensor, lengths: list[int], *, on_the_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace what is beyond each row's length by pads; returns tokens and mask."""
    columns = torch.arange(inputs.shape[1])
    mask = torch.stack(
        [columns >= inputs.shape[1] - length if on_the_left else columns < length for length in lengths]
    ).long()
    return inputs * mask, mask


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 1e-5 * max(1.0, float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= limit


def test_the_class_is_that_of_transformers(pair: Any) -> None:
    model, local = pair.both
    assert isinstance(model, type(local))
    assert type(model).__name__ == type(local).__name__
    assert model.config.num_hidden_layers == local.config.num_hidden_layers
    remote_parameters = {name for name, _ in model.named_parameters()}
    assert remote_parameters < {name for name, _ in local.named_parameters()}
    assert not any(".0." in name for name in remote_parameters)


@torch.no_grad()
def test_logits(pair: Any) -> None:
    model, local = pair.both
    inputs = batch(0, 2, 9)
    assert_close(model(inputs).logits, local(inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("on_the_left", [True, False])
def test_logits_of_padded_batches(pair: Any, on_the_left: bool) -> None:
    model, local = pair.both
    inputs, mask = pad(batch(1, 3, 8), [8, 3, 5], on_the_left=on_the_left)
    actual = model(inputs, attention_mask=mask).logits
    expected = local(inputs, attention_mask=mask).logits
    assert_close(actual[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_logits_with_positions_of_the_caller(pair: Any) -> None:
    model, local = pair.both
    if model.config.model_type == "bloom":
        pytest.skip("bloom has no positions")
    inputs = batch(2, 2, 6)
    positions = torch.tensor([[0, 1, 2, 7, 8, 9], [4, 5, 6, 7, 8, 9]])
    actual = model(inputs, position_ids=positions).logits
    assert_close(actual, local(inputs, position_ids=positions).logits)
    assert float((actual - model(inputs).logits).abs().max()) > 1e-3, "positions made no difference"


@torch.no_grad()
def test_a_batch_larger_than_one_request(pair: Any) -> None:
    local = pair.local
    options = ClientOptions.make(initial_peers=pair.swarm.initial_peers, max_tokens_per_request=10)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        pair.folder, initial_peers=[], options=options, dtype=torch.float32
    )
    try:
        inputs, mask = pad(batch(3, 5, 8), [8, 3, 5, 1, 8], on_the_left=True)
        assert_close(
            model(inputs, attention_mask=mask).logits[mask.bool()],
            local(inputs, attention_mask=mask).logits[mask.bool()],
        )
        # In a session the prompt goes in several steps that are under way at once.
        assert torch.equal(
            model.generate(inputs, attention_mask=mask, max_new_tokens=4, do_sample=False),
            local.generate(inputs, attention_mask=mask, max_new_tokens=4, do_sample=False),
        )
    finally:
        model.close()


def test_greedy_tokens(pair: Any) -> None:
    model, local = pair.both
    inputs = batch(4, 1, 7)
    options = {**GREEDY, "max_new_tokens": 24}
    assert torch.equal(model.generate(inputs, **options), local.generate(inputs, **options))


def test_greedy_tokens_of_a_left_padded_batch(pair: Any) -> None:
    model, local = pair.both
    inputs, mask = pad(batch(5, 3, 8), [2, 8, 5], on_the_left=True)
    options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 16}
    assert torch.equal(model.generate(inputs, **options), local.generate(inputs, **options))


def test_greedy_tokens_of_a_session_that_is_cut_back(pair: Any) -> None:
    model, local = pair.both
    first, second, third = (batch(seed, 2, width) for seed, width in ((7, 6), (8, 4), (9, 2)))
    options = {**GREEDY, "max_new_tokens": 8}

    def expected(*parts: torch.Tensor) -> torch.Tensor:
        """What the local model says to all of it at once."""
        inputs = torch.cat(parts, dim=1)
        outputs: torch.Tensor = local.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        return outputs[:, inputs.shape[1] :]

    with model.inference_session(max_length=64) as session:
        before = model.generate(first, **options)
        session.truncate(session.position - 5)
        kept = before[:, : session.position]
        middle = model.generate(second, **options)
        last = model.generate(third, **options)
    assert torch.equal(before[:, 6:], expected(first))
    assert torch.equal(middle[:, 4:], expected(kept, second))
    assert torch.equal(last[:, 2:], expected(kept, middle, third))


@torch.no_grad()
def test_hidden_states_of_a_base_model(shared_swarm: Any, checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints("llama")
    model = AutoDistributedModel.from_pretrained(folder, initial_peers=shared_swarm("llama").initial_peers)
    try:
        local = AutoModel.from_pretrained(folder).eval()
        inputs = batch(6, 2, 5)
        assert type(model).__name__ == "LlamaModel"
        assert_close(model(inputs).last_hidden_state, local(inputs).last_hidden_state)
    finally:
        model.close()
