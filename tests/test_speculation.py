"""Drafts through a swarm: the tokens are those without, and sampled ones keep their distribution."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from petals_core.errors import InvalidRequestError

DRAFT = Path(__file__).resolve().parent.parent / "models" / "demo-draft"
TOPICS = (
    *("a list", "a tuple", "a set", "a string", "an integer", "a module", "a class", "a function", "a method"),
    *("an exception", "an iterator", "a generator", "a decorator", "a thread", "a process", "a socket", "a file"),
    *("a path", "a pattern", "a namespace", "a package", "a test", "an object", "a coroutine", "an attribute"),
)
PROMPTS = [f"User: What is {topic}?\nAssistant:" for topic in TOPICS] + [f"Return {topic} that" for topic in TOPICS]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def demo(pairs: Any) -> Any:
    return pairs("demo")


@pytest.fixture(scope="module")
def words(demo: Any) -> Any:
    return AutoTokenizer.from_pretrained(demo.folder, padding_side="left")


def test_fifty_prompts(demo: Any, words: Any) -> None:
    batch = words(PROMPTS, padding=True, return_tensors="pt")
    assert len(PROMPTS) == 50
    expected = demo.local.generate(**batch, max_new_tokens=NUM_TOKENS, **GREEDY)[:, -NUM_TOKENS:]
    num_steps = 0
    for number, prompt in enumerate(PROMPTS):
        inputs = words(prompt, return_tensors="pt")
        options = {"draft_model": str(DRAFT)} | ({"num_drafts": 5} if number % 2 else {})
        with demo.model.inference_session(max_length=80) as session:
            tokens = demo.model.generate(**inputs, max_new_tokens=NUM_TOKENS, **GREEDY, **options)
            num_steps += len(session.trace())
        assert torch.equal(tokens[0, -NUM_TOKENS:], expected[number]), prompt
    assert num_steps < 0.8 * len(PROMPTS) * NUM_TOKENS, "drafts saved no trips"
    rows = demo.model.generate(
        **batch, max_new_tokens=NUM_TOKENS, **GREEDY, speculation="draft", draft_model=str(DRAFT), num_drafts=2
    )
    assert torch.equal(rows[:, -NUM_TOKENS:], expected)


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("mode", ["lookup", "draft", "auto"])
def test_families(pairs: Any, family: str, num_rows: int, mode: str) -> None:
    pair = pairs(family)
    phrase = torch.randint(3, 259, (num_rows, 5), generator=torch.Generator().manual_seed(1))
    prompt = torch.cat([phrase, phrase, phrase], dim=1)
    mask = torch.ones_like(prompt)
    mask[0, : 4 if num_rows > 1 else 0] = 0
    options = {"attention_mask": mask, "max_new_tokens": 16, **GREEDY}
    expected = pair.local.generate(prompt * mask, **options)
    drafting = {"speculation": mode, "num_drafts": 4} | ({} if mode == "lookup" else {"draft_model": pair.local})
    assert torch.equal(pair.model.generate(prompt * mask, **options, **drafting), expected)


def test_rows_that_end_and_what_watches_them(pairs: Any) -> None:
    """Ends, processors, stopping criteria and streamers see one column after another."""
    pair = pairs("llama")
    prompt = torch.randint(3, 259, (2, 6), generator=torch.Generator().manual_seed(0))
    unended = pair.local.generate(prompt, max_new_tokens=12, **GREEDY)
    ends = [int(unended[0, 8]), int(unended[1, 12])]

    class Columns(BaseStreamer):
        def __init__(self) -> None:
            self.columns: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.columns.append(value.tolist())

        def end(self) -> None:
            self.columns.append([])

    seen: dict[str, tuple[list[int], Columns]] = {}
    for name, model in (("local", pair.local), ("remote", pair.model)):
        lengths: list[int] = []
        streamer = Columns()
        drafting = {} if name == "local" else {"draft_model": pair.local, "speculation": "draft", "num_drafts": 3}
        seen[name] = (lengths, streamer)
        tokens = model.generate(
            prompt,
            max_new_tokens=12,
            **{**GREEDY, "eos_token_id": ends},
            repetition_penalty=1.2,
            logits_processor=[lambda ids, scores, lengths=lengths: (lengths.append(ids.shape[1]), scores)[1]],
            stopping_criteria=[lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)],
            streamer=streamer,
            **drafting,
        )
        seen[f"{name} tokens"] = tokens
    assert torch.equal(seen["local tokens"], seen["remote tokens"])  # type: ignore[arg-type]
    assert seen["local"][0] == seen["remote"][0]
    assert seen["local"][1].columns == seen["remote"][1].columns


def test_in_a_session_whose_server_fails(new_swarm: Any, checkpoints: Any) -> None:
    import transformers

    import petals_client

    swarm = new_swarm()
    folder = checkpoints("llama")
    doomed = swarm.add(folder, 0, 6, torch_dtype="float32")
    model = petals_client.AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=swarm.initial_peers, dtype=torch.float32
    )
    local = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.randint(3, 259, (1, 6), generator=torch.Generator().manual_seed(0))
    options = {**GREEDY, "draft_model": local, "num_drafts": 3, "speculation": "draft"}
    try:
        with model.inference_session(max_length=40):
            first = model.generate(prompt, max_new_tokens=8, **options)
            swarm.add(folder, 0, 6, torch_dtype="float32")
            swarm.remove(doomed)
            second = model.generate(None, max_new_tokens=8, **options)
    finally:
        model.close()
    expected = local.generate(prompt, max_new_tokens=16, **GREEDY)
    assert torch.equal(torch.cat([first, second], dim=1), expected)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_lookup_samples_the_same_tokens_from_the_same_seed(demo: Any, words: Any) -> None:
    inputs = words("The list is a list that is a list that is a", return_tensors="pt")
    outputs = []
    for options in ({"speculation": "off"}, {"speculation": "lookup", "num_drafts": 4}):
        torch.manual_seed(5)
        outputs.append(demo.model.generate(**inputs, do_sample=True, top_p=0.9, top_k=0, max_new_tokens=24, **options))
    assert torch.equal(*outputs)


def expected_pairs(local: Any, prompt: torch.Tensor, top_p: float) -> dict[tuple[int, int], float]:
    """The chance of each pair of tokens that may come first, at temperature 1."""

    def choices(tokens: torch.Tensor) -> list[dict[int, float]]:
        probabilities = local(tokens).logits[:, -1].softmax(dim=-1)
        rows = []
        for row in probabilities:
            ordered, order = row.sort(descending=True)
            kept = ordered.cumsum(0) - ordered < top_p
            rows.append(dict(zip(order[kept].tolist(), (ordered[kept] / ordered[kept].sum()).tolist(), strict=True)))
        return rows

    (first,) = choices(prompt)
    follow = torch.tensor(list(first))[:, None]
    second = choices(torch.cat([prompt.expand(len(first), -1), follow], dim=1))
    return {
        (one, two): chance * part
        for (one, chance), row in zip(first.items(), second, strict=True)
        for two, part in row.items()
    }


@torch.no_grad()
def test_sampled_pairs_are_distributed_as_without(demo: Any, words: Any) -> None:
    """Chi-square at temperature 1 and top-p 0.9; the second token is always a draft that was taken or replaced.

    Many rows side by side hardly ever have all drafts taken, and single ones often have.
    """
    prompt = words("User: What is a list?\nAssistant:", return_tensors="pt")["input_ids"]
    expected = expected_pairs(demo.local, prompt, 0.9)
    torch.manual_seed(11)
    counts: Counter[tuple[int, int]] = Counter()
    for num_rows in [48] * 25 + [1] * 60:
        rows = demo.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_p=0.9,
            top_k=0,
            eos_token_id=None,
            pad_token_id=1,
            max_new_tokens=3,
            num_return_sequences=num_rows,
            speculation="draft",
            draft_model=str(DRAFT),
            num_drafts=2,
        )
        counts.update((int(one), int(two)) for one, two in rows[:, prompt.shape[1] : prompt.shape[1] + 2])
    assert set(counts) <= set(expected), "a token that top-p excludes"
    total = counts.total()
    common = [pair for pair, chance in expected.items() if chance * total >= 5]
    observed = [float(counts[pair]) for pair in common]
    wanted = [expected[pair] * total for pair in common]
    observed.append(total - sum(observed))
    wanted.append(total - sum(wanted))
    assert len(common) > 4
    statistic = sum((one - other) ** 2 / other for one, other in zip(observed, wanted, strict=True))
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    p_value = float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))
    assert p_value > 0.01, f"{p_value:.4f}"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculation": "sometimes"}, "'sometimes' is none of auto, lookup, draft, off"),
        ({"speculation": "draft"}, "needs a small model with the same tokenizer"),
        ({"num_drafts": 99}, "num_drafts is 0 to 16"),
        ({"speculation": "lookup", "num_beams": 2}, "does not go together with beam search"),
        ({"speculation": "lookup", "prompt_lookup_num_tokens": 2}, "with prompt_lookup_num_tokens"),
    ],
)
def test_contradictions(demo: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        demo.model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, **options)


def test_a_folder_without_a_model(demo: Any, tmp_path: Path) -> None:
    from petals_core.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="can't be loaded"):
        demo.model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, draft_model=str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"can't be loaded: there is no folder \./nowhere: check the path"):
        demo.model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, draft_model="./nowhere")


def test_a_draft_model_with_another_tokenizer(demo: Any, pairs: Any) -> None:
    with pytest.raises(InvalidRequestError, match="pass it as assistant_model with assistant_tokenizer"):
        demo.model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, draft_model=pairs("llama").local)
