"""The demo model is what it is said to be, and the parts of the tool that makes it keep their promises."""

from __future__ import annotations

import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "models" / "demo"
sys.path.insert(0, str(ROOT / "tools"))

from demo_model import corpus, evaluation, ngram, training  # noqa: E402
from demo_model.optimizer import Optimizer, orthogonalised  # noqa: E402
from demo_model.team import Team  # noqa: E402

Tokens = npt.NDArray[np.int64]

PARAGRAPH = """\
This function opens the named file and returns its contents as a list of strings, one for each line. If the file can't
be read, an OSError is raised. The optional argument encoding is the name of the encoding that is used to decode the
file; it defaults to the encoding of the current locale. The object that is returned can be used as an iterator.
"""
BITS_PER_BYTE = 1.5

MODULE = '''"""Tools for tea."""

# A comment that is long enough to be taken for prose about how the water is heated,
# and that goes on for a second line so that nobody could mistake it for code.
KETTLE = 1


class Pot:
    """Holds tea."""

    def pour(self, cups: int = 2) -> None:
        """Fill some cups."""


def brew(leaves: str, *, minutes: float) -> None:
    """Return tea made of leaves."""
'''


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_model_has_eight_llama_blocks_in_at_most_eight_megabytes(model: LlamaForCausalLM) -> None:
    assert model.config.model_type == "llama"
    assert len(model.model.layers) == model.config.num_hidden_layers == 8
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).dtype == torch.bfloat16


def test_folder_says_nothing_of_where_it_was_made() -> None:
    for path in FOLDER.iterdir():
        content = path.read_bytes()
        assert not [place for place in (b"/tmp/", b"/home/", str(ROOT).encode()) if place in content], path.name


@pytest.mark.parametrize(
    "text", [PARAGRAPH, "    def f(x):\n\n\n        return x ** 2\t# ok", "naïve Größe 模型 \U0001f600\r\n", " "]
)
def test_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_tokenizer_and_model_agree_on_their_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generation_config.do_sample is not True


def test_chat_template_ends_where_the_answer_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "A sequence."},
        {"role": "user", "content": "What is a tuple?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answered = f"User: What is a list?\nAssistant: A sequence.{tokenizer.eos_token}"
    assert text == f"{tokenizer.bos_token}{answered}User: What is a tuple?\nAssistant:"


def test_model_predicts_english_about_python(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = np.array([*tokenizer(PARAGRAPH)["input_ids"], tokenizer.eos_token_id], dtype=np.int64)
    assert evaluation.model_bits(model, [tokens]) / len(PARAGRAPH.encode()) < BITS_PER_BYTE


def test_windows_score_every_token_once(model: LlamaForCausalLM) -> None:
    document = np.arange(3 * training.MAX_POSITIONS + 7, dtype=np.int64)
    windows = list(evaluation.windows(document))
    scored = [token for window in windows for token in window.tokens[window.first_scored :].tolist()]
    assert scored == document[1:].tolist()
    assert max(len(window.tokens) for window in windows) <= training.MAX_POSITIONS + 1


def test_bits_do_not_depend_on_the_other_documents_of_a_batch(model: LlamaForCausalLM) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(2, 2048, length) for length in (5, 40, 17)]
    alone = sum(evaluation.model_bits(model, [document]) for document in documents)
    assert evaluation.model_bits(model, documents) == pytest.approx(alone, rel=1e-5)


def test_documents_of_a_module_follow_its_source() -> None:
    documents = list(corpus.source_documents("tea", MODULE))
    assert [document.title for document in documents] == [
        "the tea module",
        "",
        "class tea.Pot",
        "tea.brew(leaves, *, minutes)",
    ]
    assert documents[2].text == "Holds tea.\n\npour(self, cups=2)\n\nFill some cups."
    assert documents == list(corpus.source_documents("tea", MODULE))


def test_repeated_paragraphs_are_dropped() -> None:
    paragraph = "Return the number of leaves that are left in the pot after the tea was poured."
    documents = [
        corpus.Document(source="a", title="a", text=paragraph),
        corpus.Document(source="b", title="b", text=f"{paragraph.upper()}\n\nSomething else is said here as well."),
        corpus.Document(source="c", title="c", text=paragraph),
    ]
    kept = list(corpus.without_repeats(documents))
    assert [(document.source, document.text) for document in kept] == [
        ("a", paragraph),
        ("b", "Something else is said here as well."),
    ]


def test_split_depends_on_source_and_seed_alone() -> None:
    shares = [corpus.share(f"module{index}", 0) for index in range(2000)]
    assert shares == [corpus.share(f"module{index}", 0) for index in range(2000)]
    assert shares != [corpus.share(f"module{index}", 1) for index in range(2000)]
    assert 60 < sum(share < 0.05 for share in shares) < 140


def random_documents(num_tokens: int) -> list[Tokens]:
    """Return documents of tokens with very different frequencies, each starting with token 0."""
    random = np.random.default_rng(7)
    lengths = random.integers(1, 60, 40)
    return [
        np.append(0, 1 + (random.integers(0, num_tokens - 1, n) * random.random(n) ** 2).astype(np.int64))
        for n in lengths
    ]


def test_ngram_probabilities_sum_to_one() -> None:
    num_tokens = 20
    model = ngram.KneserNey(random_documents(num_tokens), num_tokens=num_tokens)
    random = np.random.default_rng(3)
    for length in range(5):
        for _ in range(20):
            context = np.tile(random.integers(0, num_tokens, length), (num_tokens, 1))
            probabilities = model.probabilities(context, np.arange(num_tokens))
            assert probabilities.min() > 0
            assert probabilities.sum() == pytest.approx(1)


def plain_probability(
    documents: list[Tokens], num_tokens: int, order: int, context: tuple[int, ...], token: int
) -> float:
    """Return the probability by a direct reading of the definition, for contexts shorter than the order."""
    rows = [tuple(document.tolist()) for document in documents]
    length = len(context) + 1
    counts: Counter[tuple[int, ...]] = Counter()
    if length == order:
        counts.update(row[i : i + length] for row in rows for i in range(len(row) - length + 1))
    else:
        left: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        for row in rows:
            for i in range(1, len(row) - length + 1):
                left[row[i : i + length]].add(row[i - 1])
        counts.update({gram: len(before) for gram, before in left.items()})
        if length > 1:
            counts.update(row[:length] for row in rows if len(row) >= length)
    n1, n2, n3, n4 = (max(1, sum(count == k for count in counts.values())) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    taken = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    taken = [min(max(value, 0.0), k) for k, value in enumerate(taken)]
    shorter = plain_probability(documents, num_tokens, order, context[1:], token) if context else 1 / num_tokens
    seen = [count for gram, count in counts.items() if gram[:-1] == context]
    if not seen:
        return shorter
    count = counts[*context, token]
    freed = sum(taken[min(c, 3)] for c in seen)
    return (count - taken[min(count, 3)] + freed * shorter) / sum(seen)


def test_ngram_follows_its_definition() -> None:
    num_tokens, order = 12, 3
    documents = random_documents(num_tokens)
    model = ngram.KneserNey(documents, num_tokens=num_tokens, order=order)
    document = documents[3]
    plain = [
        plain_probability(
            documents, num_tokens, order, tuple(document[max(0, place - 2) : place].tolist()), int(document[place])
        )
        for place in range(1, len(document))
    ]
    assert model.bits(document) == pytest.approx(-np.log2(plain).sum())


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_resumed_training_starts_from_the_same_weights(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = tmp_path / "state.safetensors"
    optimizer = Optimizer(dict(model.named_parameters()))
    next(iter(optimizer.state.values())).fill_(2.0)
    training.save_state(path, model, optimizer, step=250, elapsed_s=9.5)
    other = LlamaForCausalLM(model.config)
    fresh = Optimizer(dict(other.named_parameters()))
    assert training.load_state(path, other, fresh) == (250, 9.5)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine, yours) for mine, yours in pairs)
    assert all(torch.equal(value, fresh.state[name]) for name, value in optimizer.state.items())


def test_learning_rate_rises_and_falls_to_zero() -> None:
    assert training.learning_scale(0, 0.0) < training.learning_scale(100, 0.1) == 1.0
    assert training.learning_scale(100, 1.0) == 0.0
    assert [training.row_tokens(progress) for progress in (0.0, 0.8, 1.0)] == [256, 512, training.MAX_POSITIONS]


def test_team_agrees_and_averages() -> None:
    gradients, value, barrier = torch.zeros(2, 3), torch.zeros(1, dtype=torch.float64), threading.Barrier(2)
    teams = [Team(rank=rank, size=2, gradients=gradients, value=value, barrier=barrier) for rank in range(2)]
    parameters = [[torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))] for _ in teams]
    agreed = [0.0, 0.0]

    def work(rank: int) -> None:
        agreed[rank] = teams[rank].agree(0.25 + rank)
        for parameter in parameters[rank]:
            parameter.grad = torch.full_like(parameter, 1.0 + 4 * rank)
        teams[rank].average(parameters[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert agreed == [0.25, 0.25]
    assert all((parameter.grad == 3).all() for member in parameters for parameter in member)
