"""``generate`` with what it takes locally: sampling, beams, drafts, streaming, stopping, and calls from anywhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from petals_client import AutoDistributedModelForCausalLM
from petals_core.errors import InvalidRequestError


@pytest.fixture(scope="module")
def swarm(shared_swarm: Any) -> Any:
    return shared_swarm("llama")


@pytest.fixture(scope="module")
def model(swarm: Any, checkpoints: Any) -> Iterator[Any]:
    model = AutoDistributedModelForCausalLM.from_pretrained(checkpoints("llama"), initial_peers=swarm.initial_peers)
    yield model
    model.close()


@pytest.fixture(scope="module")
def local(checkpoints: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoints("llama")).eval()


PROMPT = torch.randint(3, 259, (2, 6), generator=torch.Generator().manual_seed(0))
ONE = torch.cat([PROMPT[:1], PROMPT[:1]], dim=1)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
        {"guidance_scale": 1.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_modes(model: Any, local: Any, options: dict[str, Any]) -> None:
    outputs = []
    for each in (model, local):
        torch.manual_seed(1)
        outputs.append(each.generate(PROMPT, max_new_tokens=8, **{**GREEDY, **options}))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("num_tokens", [1, 3, 10])
def test_prompt_lookup(model: Any, local: Any, num_tokens: int) -> None:
    drafted = model.generate(ONE, max_new_tokens=16, prompt_lookup_num_tokens=num_tokens, **GREEDY)
    assert torch.equal(drafted, local.generate(ONE, max_new_tokens=16, **GREEDY))


def test_an_assistant(model: Any, local: Any) -> None:
    drafted = model.generate(ONE, max_new_tokens=16, assistant_model=local, **GREEDY)
    assert torch.equal(drafted, local.generate(ONE, max_new_tokens=16, **GREEDY))


def test_embeddings_as_a_prompt(model: Any, local: Any) -> None:
    embeddings = local.get_input_embeddings()(PROMPT).detach()
    actual = model.generate(inputs_embeds=embeddings, max_new_tokens=8, **GREEDY)
    assert torch.equal(actual, local.generate(inputs_embeds=embeddings, max_new_tokens=8, **GREEDY))


def test_streamer(model: Any) -> None:
    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended = True

    recorder = Recorder()
    sequences = model.generate(ONE, max_new_tokens=5, streamer=recorder, **GREEDY)
    assert recorder.tokens == sequences[0].tolist()
    assert recorder.ended


def test_stopping(model: Any) -> None:
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= ONE.shape[1] + 3)

    assert model.generate(ONE, max_new_tokens=9, stopping_criteria=[AfterThree()], **GREEDY).shape[1] == 15


def test_a_dictionary_as_a_result(model: Any, local: Any) -> None:
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True, **GREEDY}
    actual, expected = (each.generate(PROMPT, **options) for each in (model, local))
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.scores, expected.scores)


def test_no_session_is_left(model: Any, swarm: Any) -> None:
    model.generate(PROMPT, max_new_tokens=2, num_beams=2, **GREEDY)
    with pytest.raises(ZeroDivisionError):
        model.generate(PROMPT, max_new_tokens=4, stopping_criteria=[lambda *_, **__: 1 / 0], **GREEDY)
    swarm.wait_for_sessions(0)


# --- from anywhere ----------------------------------------------------------------------------------------------------


def test_threads(model: Any, local: Any) -> None:
    results: dict[int, torch.Tensor] = {}

    def run(seed: int) -> None:
        prompt = torch.randint(3, 259, (1, 5 + seed), generator=torch.Generator().manual_seed(seed))
        results[seed] = model.generate(prompt, max_new_tokens=6, **GREEDY)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in results.items():
        assert torch.equal(result, local.generate(result[:, : 5 + seed], max_new_tokens=6, **GREEDY))
    assert len(results) == 4


def test_inside_a_running_loop(model: Any, local: Any) -> None:
    async def run() -> torch.Tensor:
        return model.generate(ONE, max_new_tokens=4, **GREEDY)

    assert torch.equal(asyncio.run(run()), local.generate(ONE, max_new_tokens=4, **GREEDY))


# --- what can't be done -----------------------------------------------------------------------------------------------


def test_a_foreign_cache_is_refused(model: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"past_key_values of type DynamicCache .* model.inference_session"):
        model.generate(ONE, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(InvalidRequestError, match="past_key_values of type DynamicCache"):
        model(ONE, past_key_values=DynamicCache())


def test_the_cache_of_a_plain_forward_is_refused(model: Any) -> None:
    with torch.no_grad():
        outputs = model(ONE)
        with pytest.raises(InvalidRequestError, match="kept nothing: open a session"):
            model(ONE[:, :1], past_key_values=outputs.past_key_values)


def test_a_4d_mask_is_refused(model: Any) -> None:
    with pytest.raises(InvalidRequestError, match="attention masks of four dimensions"):
        model(ONE, attention_mask=torch.ones(1, 1, 12, 12))


@pytest.mark.parametrize("name", ["output_attentions", "output_router_logits"])
def test_what_stays_with_the_servers(model: Any, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} is not available"):
        model(ONE, **{name: True})


def test_paged_generation_is_refused(model: Any) -> None:
    with pytest.raises(InvalidRequestError, match="paged generation"):
        model.generate(ONE, cache_implementation="paged")


def test_gradients_stop_with_a_clear_line(model: Any) -> None:
    loss = model(ONE, labels=ONE).loss
    with pytest.raises(InvalidRequestError, match="gradients do not flow through remote blocks"):
        loss.backward()


def test_saving_is_refused(model: Any, tmp_path: Any) -> None:
    with pytest.raises(InvalidRequestError, match="broken checkpoint"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
