"""Drafts for several rows: the tokens are those without drafts, in fewer steps where drafts come true."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from petals_core.errors import InvalidRequestError

PHRASE = torch.randint(3, 20, (3, 5), generator=torch.Generator().manual_seed(0))
INPUTS = torch.cat([PHRASE, PHRASE, PHRASE], dim=1)
MASK = torch.ones_like(INPUTS)
MASK[0, :4] = 0
COMMON = {"attention_mask": MASK, "max_new_tokens": 20, "pad_token_id": 0, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": [2, 77, 100, 120, 200, 210, 31]},
        {"do_sample": True, "temperature": 0.7},
        {"repetition_penalty": 1.3},
        {"prefix_allowed_tokens_fn": lambda row, _: list(range(10 + 60 * row, 60 + 60 * row))},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_same_tokens(model: Any, local: Any, drafts: str, options: dict[str, Any]) -> None:
    drafting = {"prompt_lookup_num_tokens": 3} if drafts == "lookup" else {"assistant_model": local}
    torch.manual_seed(0)
    actual = model.generate(INPUTS, **{**COMMON, **options, **drafting})
    torch.manual_seed(0)
    assert torch.equal(actual, local.generate(INPUTS, **{**COMMON, **options}))


def test_drafts_that_come_true_save_steps(model: Any, local: Any, swarm: Any) -> None:
    before = swarm.chain.num_steps
    model.generate(INPUTS, **COMMON, assistant_model=local)
    assert swarm.chain.num_steps - before <= 12
    one = {"prefix_allowed_tokens_fn": lambda *_: [5], "prompt_lookup_num_tokens": 4}
    before = swarm.chain.num_steps
    model.generate(INPUTS, **COMMON, **one)
    assert swarm.chain.num_steps - before <= 10


def test_in_a_session(model: Any, local: Any) -> None:
    with model.inference_session(max_length=60) as session:
        one = model.generate(INPUTS, **COMMON, prompt_lookup_num_tokens=2)
        assert session.position == one.shape[1] - 1
        two = model.generate(None, **{**COMMON, "attention_mask": None, "max_new_tokens": 6}, assistant_model=local)
    expected = local.generate(INPUTS, **{**COMMON, "max_new_tokens": 26})
    assert torch.equal(torch.cat([one, two], dim=1), expected)


def test_scores_and_states(model: Any, local: Any) -> None:
    wanted = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    actual = model.generate(INPUTS, **COMMON, **wanted, assistant_model=local)
    expected = local.generate(INPUTS, **COMMON, **wanted)
    for name in ("scores", "logits"):
        assert len(actual[name]) == 20
        for one, other in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for column, (one, other) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        shown = MASK.bool() if column == 0 else slice(None)
        for state, expected_state in zip(one, other, strict=True):
            torch.testing.assert_close(state[shown], expected_state[shown], rtol=1e-4, atol=1e-4)


def test_embeddings_as_prompts(model: Any, local: Any) -> None:
    embeddings = local.get_input_embeddings()(INPUTS).detach()
    options = {**COMMON, "max_new_tokens": 8}
    actual = model.generate(inputs_embeds=embeddings, **options, prompt_lookup_num_tokens=2)
    assert torch.equal(actual, local.generate(inputs_embeds=embeddings, **options))


def test_the_models_own_blocks_do_not_draft(model: Any) -> None:
    with pytest.raises(InvalidRequestError, match="assistant_early_exit drafts with the model's own blocks"):
        model.generate(INPUTS[:1], assistant_early_exit=1, max_new_tokens=2)
    with pytest.raises(InvalidRequestError, match="leave use_cache=False out"):
        model.generate(INPUTS, use_cache=False, prompt_lookup_num_tokens=2, max_new_tokens=2)
