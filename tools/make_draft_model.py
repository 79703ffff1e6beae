"""Distil a small draft model from the demo model, and say how many tokens a trip it is good for."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import make_demo_model
from demo_model import corpus, distillation, tokenizer, training

ROOT = Path(__file__).resolve().parent.parent
STEPS_PER_EVALUATION = 250
NUM_PROMPTS = 64
NUM_DRAFTS = 8
FORMS = ((4, 0), (8, 0), (12, 0), (16, 0), (4, 4), (8, 4), (8, 8))
"""Drafts in a row, and second choices beside the first of them, for what a check says of the model."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=ROOT / "models" / "demo", help="the trained model's folder")
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "demo-draft", help="the draft model's folder")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of the draft model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="units of each feed-forward (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="training steps at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="minutes of training at most (default: no limit)")
    parser.add_argument("--batches", type=int, default=64, help="batches the teacher writes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of text, order and samples (default: %(default)s)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the model in the folder, train nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train or load the draft model, then print its figures."""
    arguments = parse(argv)
    console = Console()
    torch.set_num_threads(1)
    found = corpus.collect(seed=arguments.seed, heldout_share=make_demo_model.HELDOUT_SHARE)
    teacher, words = make_demo_model.load(arguments.teacher)
    teacher.requires_grad_(False).eval()
    heldout = tokenizer.encode(words, found.heldout)[:NUM_PROMPTS]
    if not arguments.evaluate_only:
        model = distillation.new_draft_model(teacher, num_blocks=arguments.blocks, intermediate_size=arguments.width)
        train(model, teacher, words, found, arguments, console)
    model = LlamaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32, local_files_only=True)
    console.print(f"weights: {(arguments.output / 'model.safetensors').stat().st_size:,} bytes")
    for num_drafts, num_seconds in FORMS:
        rate = distillation.tokens_per_trip(model, teacher, heldout, num_drafts=num_drafts, num_seconds=num_seconds)
        tree = f" and {num_seconds} second choices beside them (a tree)" if num_seconds else ""
        console.print(f"held-out beginnings, {num_drafts} drafts{tree}: {rate:.2f} tokens per trip")


def train(
    model: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    words: PreTrainedTokenizerFast,
    found: corpus.Corpus,
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    """Train the draft model, saving it and printing its figure every so many steps and at the end."""
    started = time.monotonic()
    documents = tokenizer.encode(words, found.train)
    heldout = tokenizer.encode(words, found.heldout)[:NUM_PROMPTS]
    documents += distillation.written(teacher, documents, num_batches=arguments.batches, seed=arguments.seed)
    console.print(f"{time.monotonic() - started:6.0f} s  {sum(map(len, documents)):,} tokens to learn from")
    arguments.output.mkdir(parents=True, exist_ok=True)
    budget = training.Budget(num_steps=arguments.steps, duration_s=arguments.minutes and arguments.minutes * 60)
    for report in distillation.distil(model, teacher, documents, budget, seed=arguments.seed):
        if report.step % STEPS_PER_EVALUATION == 0:
            save(model, words, arguments.output)
            rate = distillation.tokens_per_trip(model, teacher, heldout, num_drafts=NUM_DRAFTS)
            console.print(
                f"{time.monotonic() - started:6.0f} s  step {report.step:5}  loss {report.loss:.3f}"
                f"  {rate:.2f} tokens per trip"
            )
    save(model, words, arguments.output)


def save(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16; its tokenizer is the teacher's, and stays there."""
    make_demo_model.save(model, words, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
