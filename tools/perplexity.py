"""Perplexity of the demo model on held-out text, by itself and through swarms of three servers on this machine:
``python3 tools/perplexity.py``.

The swarms compute in float32: exactly, with hidden states in int8 on the wire, with weights in nf4, and with both.
Prints the table of ``docs/quantization.md``. Fails if the exact swarm is not the local model.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import argparse
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from demo_model import corpus, evaluation, tokenizer
from demo_model.evaluation import Tokens
from local_swarm import READY, LocalSwarm, spans, stopping_in_order
from make_demo_model import HELDOUT_SHARE
from petals_client import AutoDistributedModelForCausalLM, ClientOptions

ROOT = Path(__file__).resolve().parent.parent
NUM_SERVERS = 3
TIMEOUT_S = 120.0
EXACT_TOLERANCE = 1e-5
"""By how much of itself the perplexity of the exact swarm may differ from the local one."""
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one way of computing made of the text."""

    weights: str
    activations: str
    perplexity: float


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Perplexity of a model on held-out text, through swarms of servers.")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo", help="folder (default: the demo model)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of text, about (default: %(default)s)")
    return parser.parse_args(argv)


def choose_text(folder: Path, num_tokens: int) -> list[Tokens]:
    """Held-out documents, in an order that is always the same, until there are so many tokens."""
    words = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    documents = list(tokenizer.encode(words, corpus.collect(seed=SEED, heldout_share=HELDOUT_SHARE).heldout))
    random.Random(SEED).shuffle(documents)
    chosen: list[Tokens] = []
    while documents and sum(map(len, chosen)) < num_tokens:
        chosen.append(documents.pop())
    return chosen


def perplexity(model: Any, documents: Sequence[Tokens]) -> float:
    """Of the tokens behind the first of each document."""
    num_scored = sum(len(document) - 1 for document in documents)
    return float(2.0 ** (evaluation.model_bits(model, documents) / num_scored))


def through_swarm(folder: Path, documents: Sequence[Tokens], num_blocks: int, quantization: str) -> list[Result]:
    """Start servers with such weights, and compute with exact and with lossy activations."""
    with LocalSwarm() as swarm:
        swarm.start_bootstrap()
        servers = [
            swarm.start_server(folder, start, end, "--quantization", quantization)
            for start, end in spans(num_blocks, NUM_SERVERS)
        ]
        for server in servers:
            server.wait_for(READY, TIMEOUT_S)
        results = []
        for codec in (None, "int8"):
            options = ClientOptions.make(initial_peers=[swarm.address], activation_codec=codec, compression="none")
            model = AutoDistributedModelForCausalLM.from_pretrained(
                folder, initial_peers=[swarm.address], torch_dtype=torch.float32, options=options
            )
            try:
                value = perplexity(model, documents)
            finally:
                model.close()
            weights = "as stored" if quantization == "none" else quantization
            results.append(Result(weights=weights, activations=codec or "exact", perplexity=value))
        return results


def table(local: float, results: Sequence[Result]) -> str:
    """The results beside the local one, in Markdown."""
    lines = [
        "| weights | hidden states on the wire | perplexity | local | change |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        change = 100 * (result.perplexity / local - 1)
        lines.append(
            f"| {result.weights} | {result.activations} | {result.perplexity:.4f} | {local:.4f} | {change:+.3f} % |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    logging.disable_progress_bar()
    started_s = time.monotonic()
    documents = choose_text(arguments.model, arguments.tokens)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, local_files_only=True)
    num_blocks = int(model.config.num_hidden_layers)
    local = perplexity(model, documents)
    results: list[Result] = []
    with stopping_in_order(), tempfile.TemporaryDirectory(prefix="petals-perplexity-") as cache:
        os.environ["PETALS_CACHE_DIR"] = cache
        for quantization in ("none", "nf4"):
            results += through_swarm(arguments.model, documents, num_blocks, quantization)
    exact = results[0].perplexity
    print(table(local, results))
    print(
        f"\n{sum(map(len, documents)):,} tokens of {len(documents)} documents, {NUM_SERVERS} servers, float32, "
        f"{time.monotonic() - started_s:.0f} s"
    )
    if not math.isclose(exact, local, rel_tol=EXACT_TOLERANCE):
        print("the exact swarm is not the local model", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
