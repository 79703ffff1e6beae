"""Train the demo model on English about Python and say how well it predicts text it has never seen."""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_model import card, corpus, evaluation, ngram, tokenizer, training
from demo_model.team import Team, assembled

Tokens = npt.NDArray[np.int64]

ROOT = Path(__file__).resolve().parent.parent
HELDOUT_SHARE = 0.05
DEFAULT_STEPS = 3000
STEPS_PER_EVALUATION = 250
SAMPLE_TOKENS = 80
PROMPTS = ("A Python list is", "User: What is asyncio?\nAssistant:", "Return the number of")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The corpus in tokens, with its size in bytes of UTF-8."""

    train: Sequence[Tokens]
    heldout: Sequence[Tokens]
    train_bytes: int
    heldout_bytes: int


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "demo", help="the model's folder")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="training steps at most (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="minutes of training at most (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that train together (default: %(default)s)")
    parser.add_argument("--state", type=Path, help="a safetensors file to resume from and to keep the state in")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the model in the folder, train nothing")
    return parser.parse_args(argv)


def options(arguments: argparse.Namespace) -> str:
    """Return the options that the result depends on."""
    limits = f"--minutes {arguments.minutes:g} " if arguments.minutes else ""
    return f"--steps {arguments.steps} {limits}--seed {arguments.seed} --workers {arguments.workers}"


def num_bytes(documents: Sequence[corpus.Document]) -> int:
    """Return the size of documents in bytes of UTF-8."""
    return sum(len(document.text.encode()) for document in documents)


def make_data(found: corpus.Corpus, words: PreTrainedTokenizerFast) -> Data:
    """Return a corpus in a tokenizer's tokens."""
    return Data(
        train=tokenizer.encode(words, found.train),
        heldout=tokenizer.encode(words, found.heldout),
        train_bytes=num_bytes(found.train),
        heldout_bytes=num_bytes(found.heldout),
    )


def save(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16, its generation defaults and its tokenizer."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)  # type: ignore[arg-type]
    rounded.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    rounded.save_pretrained(folder)
    words.save_pretrained(folder)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a saved model, its bfloat16 weights in float32, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def train(
    model: LlamaForCausalLM, words: PreTrainedTokenizerFast, data: Data, arguments: argparse.Namespace, console: Console
) -> None:
    """Train a model, saving it and printing its held-out figure every so many steps and at the end."""
    budget = training.Budget(num_steps=arguments.steps, duration_s=arguments.minutes and arguments.minutes * 60)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    started = time.monotonic()

    def reports(team: Team) -> Iterator[training.Report]:
        return training.train(model, data.train, budget, team, seed=arguments.seed, state=arguments.state)

    def work(team: Team) -> None:
        for _ in reports(team):
            pass

    with assembled(arguments.workers, model, work) as team, Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=1.0)
        for report in reports(team):
            progress.update(task, completed=report.progress, description=f"step {report.step}, loss {report.loss:.3f}")
            if report.step % STEPS_PER_EVALUATION == 0:
                save(model, words, arguments.output)
                bits = evaluation.model_bits(model, data.heldout) / data.heldout_bytes
                console.print(
                    f"{time.monotonic() - started:6.0f} s  step {report.step:5}  loss {report.loss:.3f}"
                    f"  held-out {bits:.4f} bits per byte"
                )
        progress.update(task, completed=1.0)
    save(model, words, arguments.output)


def measure(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, data: Data, folder: Path) -> card.Figures:
    """Return the figures of a saved model and of an n-gram model of the same tokens."""
    baseline = ngram.KneserNey(data.train, num_tokens=len(words))
    return card.Figures(
        num_blocks=model.config.num_hidden_layers,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=(folder / "model.safetensors").stat().st_size,
        train_bytes=data.train_bytes,
        train_tokens=sum(map(len, data.train)),
        heldout_bytes=data.heldout_bytes,
        heldout_tokens=sum(map(len, data.heldout)),
        model_bits_per_byte=evaluation.model_bits(model, data.heldout) / data.heldout_bytes,
        ngram_bits_per_byte=sum(map(baseline.bits, data.heldout)) / data.heldout_bytes,
    )


def print_figures(console: Console, figures: card.Figures, samples: Sequence[str]) -> None:
    """Print the table and the samples."""
    table = Table("figure", "value", title="Demo model")
    for name, value in figures.rows():
        table.add_row(name, value)
    console.print(table)
    for sample in samples:
        console.rule()
        console.print(sample, markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Train or load the model, then print its figures; the exit status is 1 where the n-gram model is better."""
    arguments = parse(argv)
    console = Console()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the workers are stopped too
    found = corpus.collect(seed=arguments.seed, heldout_share=HELDOUT_SHARE)
    if not arguments.evaluate_only:
        words = tokenizer.train_tokenizer(document.text for document in found.train)
        arguments.output.mkdir(parents=True, exist_ok=True)
        model = training.new_model(words, seed=arguments.seed)
        train(model, words, make_data(found, words), arguments, console)
    model, words = load(arguments.output)
    figures = measure(model, words, make_data(found, words), arguments.output)
    samples = [evaluation.continuation(model, words, prompt, num_tokens=SAMPLE_TOKENS) for prompt in PROMPTS]
    print_figures(console, figures, samples)
    if not arguments.evaluate_only:
        (arguments.output / "README.md").write_text(card.text(figures, samples, options=options(arguments)), "utf-8")
    sys.exit(figures.model_bits_per_byte > figures.ngram_bits_per_byte)


if __name__ == "__main__":
    main()
