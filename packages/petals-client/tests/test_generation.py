"""Sessions and ``generate`` on a chain in this process, for families that differ in how they call their blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from petals_client.inference_session import DRAFT_COLUMNS
from petals_core.errors import InvalidRequestError, RemoteFailureError, SessionLengthError
from petals_core.models.transformers_forward import CountingCache

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
INPUTS = torch.randint(3, 259, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


@torch.no_grad()
@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt2", "gemma2", "opt"])
def test_families(make_swarm: Any, family: str) -> None:
    swarm = make_swarm(family)
    for mask in (MASK, MASK.flip(1)):
        actual = swarm.model(INPUTS, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(actual, swarm.local(INPUTS, attention_mask=mask).logits[mask.bool()])
    for options in ({}, {"num_beams": 2}):
        outputs = [
            each.generate(INPUTS * MASK, attention_mask=MASK, max_new_tokens=5, **GREEDY, **options)
            for each in (swarm.model, swarm.local)
        ]
        assert torch.equal(*outputs)


@torch.no_grad()
def test_a_classifier(make_swarm: Any) -> None:
    swarm = make_swarm("llama", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING")
    swarm.local.score.load_state_dict(swarm.model.score.state_dict())
    torch.testing.assert_close(swarm.model(INPUTS).logits, swarm.local(INPUTS).logits)
    assert not hasattr(swarm.model, "generate")


def test_one_step_per_token_and_no_trip_for_rollbacks(model: Any, swarm: Any) -> None:
    before = swarm.chain.num_steps
    model.generate(INPUTS, max_new_tokens=6, **GREEDY)
    assert swarm.chain.num_steps - before == 6
    one = torch.cat([INPUTS[:1], INPUTS[:1]], dim=1)
    before = swarm.chain.num_steps
    model.generate(one, max_new_tokens=6, prompt_lookup_num_tokens=2, **GREEDY)
    assert swarm.chain.num_steps - before <= 6
    assert not swarm.chain.open_sessions


def test_a_session_is_sized_for_its_call(model: Any, swarm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    open_session = swarm.chain.open_session
    monkeypatch.setattr(swarm.chain, "open_session", lambda **sizes: (asked.append(sizes), open_session(**sizes))[1])
    model.generate(INPUTS, max_new_tokens=4, num_beams=3, **GREEDY)
    assert asked == [{"start": 0, "end": 3, "num_rows": 6, "max_length": 7 + 4 + DRAFT_COLUMNS, "adaptation": None}]


def test_the_cache_only_counts(model: Any) -> None:
    with model.inference_session(max_length=20) as session:
        cache = session.cache
        assert isinstance(cache, CountingCache)
        assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
        with torch.no_grad():
            model(INPUTS)
        assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (7, 2, True)
        assert cache.get_mask_sizes(3, 0) == (10, 0)
        assert cache
        assert copy.deepcopy(cache) is cache
        cache.crop(0)
        cache.crop(-2)
        assert session.position == 5
        cache.crop(4)
        assert session.position == 4
        cache.reset()
        assert session.position == 0


def test_a_lost_session_goes_on_from_its_tokens(model: Any, local: Any, swarm: Any) -> None:
    expected = local.generate(INPUTS * MASK, attention_mask=MASK, max_new_tokens=6, **GREEDY)
    with model.inference_session(max_length=20):
        model.generate(INPUTS * MASK, attention_mask=MASK, max_new_tokens=3, **GREEDY)
        swarm.chain.fail_next_step = True
        with pytest.raises(RemoteFailureError, match="the server broke"):
            model.generate(None, max_new_tokens=3, **GREEDY)
        assert not swarm.chain.open_sessions
        with pytest.raises(InvalidRequestError, match=r"this session was lost \(the server broke\)"):
            model(INPUTS[:, :1])
        assert torch.equal(model.generate(None, max_new_tokens=3, **GREEDY), expected[:, -3:])


def test_a_failed_call_is_undone(model: Any) -> None:
    with model.inference_session(max_length=20) as session:
        first = model.generate(INPUTS, max_new_tokens=3, **GREEDY)
        with pytest.raises(ZeroDivisionError):
            model.generate(None, max_new_tokens=3, stopping_criteria=[lambda *_, **__: 1 / 0], **GREEDY)
        assert session.position == 9
        assert torch.equal(session.output_ids, first)


def test_tokens_of_a_forward_are_part_of_the_session(model: Any, local: Any) -> None:
    with model.inference_session(max_length=20) as session:
        with torch.no_grad():
            model(INPUTS)
        assert torch.equal(session.output_ids, INPUTS)
        continued = model.generate(None, max_new_tokens=3, **GREEDY)
    assert torch.equal(continued, local.generate(INPUTS, max_new_tokens=3, **GREEDY)[:, 7:])


def test_embeddings_have_no_tokens_to_go_on_from(model: Any) -> None:
    with model.inference_session(max_length=20) as session:
        with torch.no_grad():
            model(inputs_embeds=model.get_input_embeddings()(INPUTS))
        assert session.output_ids is None
        with pytest.raises(InvalidRequestError, match="embeddings whose tokens are not known"):
            model.generate(None, max_new_tokens=3)


def test_masks_that_do_not_fit(model: Any) -> None:
    with model.inference_session(max_length=20), torch.no_grad():
        model(INPUTS, attention_mask=MASK)
        with pytest.raises(InvalidRequestError, match="does not fit 2 rows of 7 cached and 1 new"):
            model(INPUTS[:, :1], attention_mask=torch.ones(2, 1))
        with pytest.raises(InvalidRequestError, match="the attention mask changed"):
            model(INPUTS[:, :1], attention_mask=torch.ones(2, 8))


def test_sessions_do_not_mix(model: Any, make_swarm: Any) -> None:
    other = make_swarm("gpt2").model
    with model.inference_session(max_length=9) as session:
        with pytest.raises(InvalidRequestError, match="another model's session"):
            other.generate(INPUTS, past_key_values=session.cache, max_new_tokens=1)
        assert other.remote_blocks.open_session is None
        with model.inference_session(max_length=9) as inner:
            assert model.remote_blocks.open_session is inner
        assert model.remote_blocks.open_session is session
    assert model.remote_blocks.open_session is None


def test_a_session_passed_by_hand(model: Any, local: Any) -> None:
    session = model.remote_blocks.new_session(20)
    with session:
        one = model.generate(INPUTS, session=session, max_new_tokens=2, **GREEDY)
        assert model.remote_blocks.open_session is None
        with model.use_session(session):
            two = model.generate(max_new_tokens=2, **GREEDY)
    assert torch.equal(torch.cat([one, two], 1), local.generate(INPUTS, max_new_tokens=4, **GREEDY))


@torch.no_grad()
def test_blocks_as_modules(model: Any, swarm: Any) -> None:
    """As a researcher uses them: slices, indices, own hidden states, own sessions."""
    blocks = model.remote_blocks
    assert len(blocks) == 3
    assert list(blocks) == [blocks]
    assert blocks[:3] is blocks
    assert not list(blocks.parameters())
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    whole = blocks(hidden)
    assert torch.equal(blocks[1:](blocks[0](hidden)), whole)
    assert (len(blocks[1:]), len(blocks[-3])) == (2, 1)
    with blocks.inference_session(max_length=5) as session:
        parts = [blocks(hidden[:, :3]), session.step(hidden[:, 3:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    for wrong in (slice(2, 1), slice(None, None, 2), 3, -4):
        with pytest.raises(IndexError):
            blocks[wrong]
    with pytest.raises(InvalidRequestError, match="take no mask"):
        blocks(hidden, attention_mask=torch.ones(2, 5))
    assert copy.deepcopy(model).remote_blocks.chain is swarm.chain


def test_sizes_are_checked(model: Any) -> None:
    with pytest.raises(InvalidRequestError, match="at least 1 token"):
        model.remote_blocks.new_session(0)
    with model.inference_session(max_length=4) as session, pytest.raises(SessionLengthError):
        session.step(torch.zeros(1, 5, 64))


def test_a_row_without_tokens_makes_no_trip(model: Any, swarm: Any) -> None:
    with torch.no_grad():
        before = swarm.chain.num_forwards
        model(INPUTS, attention_mask=torch.zeros_like(INPUTS))
        assert swarm.chain.num_forwards == before


# --- hidden states between blocks -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "opt"])
def test_hidden_states(make_swarm: Any, family: str) -> None:
    swarm = make_swarm(family)
    for return_dict in (True, False):
        options = {"attention_mask": MASK, "output_hidden_states": True, "return_dict": return_dict}
        actual, expected = (each(INPUTS, **options) for each in (swarm.model, swarm.local))
        states = [(each.hidden_states if return_dict else each[-1]) for each in (actual, expected)]
        assert [len(each) for each in states] == [4, 4]
        for one, other in zip(*states, strict=True):
            torch.testing.assert_close(one[MASK.bool()], other[MASK.bool()], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_some_hidden_states(model: Any, swarm: Any) -> None:
    everything = model(INPUTS, output_hidden_states=True).hidden_states
    before = swarm.chain.num_forwards
    some = model(INPUTS, output_hidden_states=[0, -2, 9]).hidden_states
    assert swarm.chain.num_forwards - before == 2, "a trip for each part of the blocks, and no more"
    assert [state is None for state in some] == [False, True, False, True]
    torch.testing.assert_close(some[2], everything[2])
    last = model(INPUTS, output_hidden_states=3)
    assert last.hidden_states[3].shape == (2, 7, 64)


@torch.no_grad()
def test_hidden_states_in_a_session(model: Any, local: Any, swarm: Any) -> None:
    expected = local(INPUTS, output_hidden_states=True).hidden_states
    with model.inference_session(max_length=9) as session:
        parts = [model(INPUTS[:, columns], output_hidden_states=True).hidden_states for columns in ([0, 1, 2, 3], [4])]
        parts.append(model(INPUTS[:, 5:], output_hidden_states=[1]).hidden_states)
        assert session.position == 7
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), expected[1], rtol=1e-4, atol=1e-4)
    assert parts[2][2] is None
    with model.inference_session(max_length=9):
        model(INPUTS[:, :4])
        with pytest.raises(InvalidRequestError, match="opened without the hidden states between blocks"):
            model(INPUTS[:, 4:], output_hidden_states=True)
    swarm.chain.fail_next_step = True
    with pytest.raises(RemoteFailureError):
        model.generate(INPUTS, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True, **GREEDY)
    assert not swarm.chain.open_sessions
