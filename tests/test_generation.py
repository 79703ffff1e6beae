"""``generate`` with what it takes locally: each option gives the local model's tokens of the same seed."""

from __future__ import annotations

import asyncio
import copy
import threading
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from petals_core.errors import InvalidRequestError


@pytest.fixture(scope="module", params=["llama", "bloom", "demo"])
def pair(request: pytest.FixtureRequest, pairs: Any) -> Any:
    """A distributed model and the same as Transformers loads it."""
    return pairs(request.param)


@pytest.fixture(scope="module")
def tokenizer(pair: Any) -> Any:
    return AutoTokenizer.from_pretrained(pair.folder)


@pytest.fixture(scope="module")
def model(pairs: Any) -> Any:
    return pairs("llama").model


@pytest.fixture(scope="module")
def local(pairs: Any) -> Any:
    return pairs("llama").local


PROMPT = torch.randint(3, 259, (2, 6), generator=torch.Generator().manual_seed(0))
ONE = torch.cat([PROMPT[:1], PROMPT[:1]], dim=1)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def generate_both(pair: Any, *args: Any, seed: int = 1, **options: Any) -> list[Any]:
    """What both models generate from the same seed."""
    outputs = []
    for each in pair.both:
        torch.manual_seed(seed)
        outputs.append(each.generate(*args, **options))
    return outputs


class OnlyEven(LogitsProcessor):
    """Allows tokens of even number in rows of even number, odd ones in the others."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_odd = torch.arange(scores.shape[1]) % 2 == 1
        rows = torch.arange(scores.shape[0]) % 2 == 1
        return scores.masked_fill(is_odd != rows[:, None], -torch.inf)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "min_p": 0.01},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"logits_processor": [OnlyEven()]},
        {"prefix_allowed_tokens_fn": lambda row, tokens: list(range(100 * row, 100 * row + 90))},
        {"num_beams": 2, "prefix_allowed_tokens_fn": lambda row, tokens: list(range(100 * row, 100 * row + 90))},
        {"bad_words_ids": [[7], [8, 9]], "min_new_tokens": 3},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
        {"guidance_scale": 1.5},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_modes(pair: Any, options: dict[str, Any]) -> None:
    outputs = generate_both(pair, PROMPT, max_new_tokens=8, **{**GREEDY, **options})
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 3, "length_penalty": -2.0}],
    ids=lambda each: "-".join(each),
)
def test_rows_that_end_at_different_times(pair: Any, options: dict[str, Any]) -> None:
    options = {**GREEDY, **options, "max_new_tokens": 12, "pad_token_id": 1}
    (unended, _) = generate_both(pair, PROMPT, **options)
    ends = [int(unended[0, 8]), int(unended[1, 12])]  # tokens that rows come to by themselves, at different steps
    if "num_beams" in options:
        ends = sorted(set(unended[:, 6:].flatten().tolist()))[::2]  # beams that end early win only sometimes
    outputs = generate_both(pair, PROMPT, **{**options, "eos_token_id": ends})
    assert torch.equal(*outputs)
    assert (outputs[0] == 1).any(), "no row ended before the other"


def test_left_padded_rows(pair: Any) -> None:
    mask = torch.ones_like(PROMPT)
    mask[0, :4] = 0
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        outputs = generate_both(pair, PROMPT * mask, attention_mask=mask, max_new_tokens=8, **{**GREEDY, **options})
        assert torch.equal(*outputs)


# --- drafts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 10])
def test_prompt_lookup(pair: Any, num_tokens: int) -> None:
    drafted = pair.model.generate(ONE, max_new_tokens=16, prompt_lookup_num_tokens=num_tokens, **GREEDY)
    assert torch.equal(drafted, pair.local.generate(ONE, max_new_tokens=16, **GREEDY))


@pytest.mark.parametrize("do_sample", [False, True])
def test_drafts_as_the_local_model_takes_them(pair: Any, do_sample: bool) -> None:
    options = {**GREEDY, "do_sample": do_sample, "max_new_tokens": 12}
    assert torch.equal(*generate_both(pair, ONE, **options, prompt_lookup_num_tokens=3))
    assert torch.equal(*generate_both(pair, ONE, **options, assistant_model=pair.local))


@pytest.mark.parametrize("do_sample", [False, True])
def test_drafts_for_several_rows(pair: Any, do_sample: bool) -> None:
    """Where Transformers refuses; the tokens are those without drafts, sampled ones from the same seed too."""
    rows = torch.cat([PROMPT, PROMPT], dim=1)
    mask = torch.ones_like(rows)
    mask[1, :5] = 0
    options = {**GREEDY, "attention_mask": mask, "do_sample": do_sample, "max_new_tokens": 12}
    torch.manual_seed(2)
    expected = pair.local.generate(rows * mask, **options)
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": pair.local}):
        torch.manual_seed(2)
        assert torch.equal(pair.model.generate(rows * mask, **options, **drafts), expected)


def test_an_assistant_with_another_tokenizer(pairs: Any) -> None:
    pair, other = pairs("demo"), pairs("llama")
    tokenizers = {
        "tokenizer": AutoTokenizer.from_pretrained(pair.folder),
        "assistant_tokenizer": AutoTokenizer.from_pretrained(other.folder),
    }
    inputs = tokenizers["tokenizer"]("What is a list?", return_tensors="pt")
    drafted = pair.model.generate(**inputs, max_new_tokens=8, assistant_model=other.local, **tokenizers, **GREEDY)
    assert torch.equal(drafted, pair.local.generate(**inputs, max_new_tokens=8, **GREEDY))


# --- prompts and results of other kinds -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=lambda each: "-".join(each))
def test_embeddings_as_a_prompt(pair: Any, options: dict[str, Any]) -> None:
    embeddings = pair.local.get_input_embeddings()(PROMPT).detach()
    assert torch.equal(*generate_both(pair, inputs_embeds=embeddings, max_new_tokens=8, **{**GREEDY, **options}))


def test_a_dictionary_as_a_result(pair: Any) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    for options in ({}, {"num_beams": 2}):
        actual, expected = generate_both(pair, PROMPT, max_new_tokens=4, **wanted, **{**GREEDY, **options})
        assert torch.equal(actual.sequences, expected.sequences)
        torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-4)
        assert len(actual.hidden_states) == 4
        assert len(actual.hidden_states[1]) == pair.model.config.num_hidden_layers + 1
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-4)
    pair.swarm.wait_for_sessions(0)


def test_streamer(pair: Any) -> None:
    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended = True

    for drafts in ({}, {"prompt_lookup_num_tokens": 2}):
        recorder = Recorder()
        sequences = pair.model.generate(ONE, max_new_tokens=5, streamer=recorder, **GREEDY, **drafts)
        assert recorder.tokens == sequences[0].tolist()
        assert recorder.ended


def test_streamed_text(pair: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = tokenizer("What is a list?", return_tensors="pt")
    sequences = pair.local.generate(**inputs, max_new_tokens=10, **GREEDY)
    expected = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :])
    pair.model.generate(**inputs, max_new_tokens=10, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {**inputs, "max_new_tokens": 10, "streamer": streamer, **GREEDY}
    thread = threading.Thread(target=pair.model.generate, kwargs=options)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_stopping(pair: Any, tokenizer: Any) -> None:
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= ONE.shape[1] + 3)

    outputs = generate_both(pair, ONE, max_new_tokens=9, stopping_criteria=[AfterThree()], **GREEDY)
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] == 15
    whole = pair.local.generate(ONE, max_new_tokens=20, **GREEDY)
    texts = [tokenizer.decode(token) for token in whole[0, 15:]]
    end = next(text for text in texts if text.strip() and "\ufffd" not in text)
    outputs = generate_both(pair, ONE, max_new_tokens=20, stop_strings=[end], tokenizer=tokenizer, **GREEDY)
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] < whole.shape[1]


def test_pipeline(pair: Any, tokenizer: Any) -> None:
    texts = []
    for each in pair.both:
        run = pipeline("text-generation", model=each, tokenizer=tokenizer)
        torch.manual_seed(3)
        results = run(["What is a list?", "class"], max_new_tokens=6, do_sample=True, batch_size=2, pad_token_id=0)
        texts.append([result[0]["generated_text"] for result in results])
    assert texts[0] == texts[1]
    assert texts[0][0].startswith("What is a list?")


def test_chat_template(pairs: Any) -> None:
    pair = pairs("demo")
    tokenizer = AutoTokenizer.from_pretrained(pair.folder)
    messages = [{"role": "user", "content": "What is a list?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.equal(*generate_both(pair, **inputs, max_new_tokens=12, do_sample=False))
    answers = [
        pipeline("text-generation", model=each, tokenizer=tokenizer)(messages, max_new_tokens=12, do_sample=False)
        for each in pair.both
    ]
    assert answers[0] == answers[1]
    assert answers[0][0]["generated_text"][-1]["role"] == "assistant"


# --- from anywhere ----------------------------------------------------------------------------------------------------


def test_no_session_is_left(pairs: Any) -> None:
    model, swarm = pairs("llama").model, pairs("llama").swarm
    model.generate(PROMPT, max_new_tokens=2, num_beams=2, **GREEDY)
    with pytest.raises(ZeroDivisionError):
        model.generate(PROMPT, max_new_tokens=4, stopping_criteria=[lambda *_, **__: 1 / 0], **GREEDY)
    swarm.wait_for_sessions(0)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(pairs: Any) -> None:
    """Only the client's part moves there."""
    model, local = (copy.deepcopy(each).to("cuda") for each in pairs("llama").both)
    for options in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        actual, expected = (
            each.generate(PROMPT.to("cuda"), max_new_tokens=6, **GREEDY, **options) for each in (model, local)
        )
        assert actual.device.type == "cuda"
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_what_the_client_computes_in(model: Any) -> None:
    """Its part may be moved to another dtype; servers compute in theirs."""
    expected = model(PROMPT).logits
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.5)):
        logits = copy.deepcopy(model).to(dtype)(PROMPT).logits
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, rtol=0.1 * tolerance, atol=tolerance)


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


def test_saving_is_refused(model: Any, tmp_path: Any) -> None:
    with pytest.raises(InvalidRequestError, match="broken checkpoint"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
