"""The figures of a trained model and the model card that states them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a training run has to show for itself; bits per byte are of held-out text, in UTF-8."""

    num_blocks: int
    num_parameters: int
    weight_bytes: int
    train_bytes: int
    train_tokens: int
    heldout_bytes: int
    heldout_tokens: int
    model_bits_per_byte: float
    ngram_bits_per_byte: float

    def rows(self) -> Sequence[tuple[str, str]]:
        """Return the figures as pairs of name and value."""
        return (
            ("blocks", f"{self.num_blocks}"),
            ("parameters", f"{self.num_parameters:,}"),
            ("weights in bfloat16, bytes", f"{self.weight_bytes:,}"),
            ("training text, bytes", f"{self.train_bytes:,}"),
            ("training text, tokens", f"{self.train_tokens:,}"),
            ("held-out text, bytes", f"{self.heldout_bytes:,}"),
            ("held-out text, tokens", f"{self.heldout_tokens:,}"),
            ("held-out bits per byte: this model", f"{self.model_bits_per_byte:.4f}"),
            ("held-out bits per byte: 5-gram", f"{self.ngram_bits_per_byte:.4f}"),
        )


def text(figures: Figures, samples: Sequence[str], *, options: str) -> str:
    """Return the model card, from the figures that the command with these options printed."""
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.rows())
    quotes = "\n\n".join(f"```text\n{sample}\n```" for sample in samples)
    return f"""---
license: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Petals demo model

A Llama-architecture model of eight blocks, small enough to be kept beside the code and really trained: the default of
the demo, of examples and of tests that need a real model. It learned English about Python and nothing else. Its answers
read like Python's documentation, and what they say is often wrong.

## Text

All of it comes with Python {platform.python_version()}: the topics behind `help()`, the docstrings and block comments
of the standard library, the docstrings of its compiled modules, and the licence. About a third of the documents with a
title are written as a question and its answer, in the form of the chat template. Paragraphs that repeat an earlier one,
or nearly, are left out. Held-out text is chosen by source: no source file, compiled definition or topic is on both
sides.

## Figures

| figure | value |
| --- | --- |
{table}

The 5-gram is interpolated modified Kneser-Ney, counted on the same tokens of the same training text. Both predict each
held-out document from its begin token to its end token; the model does so with the bfloat16 weights of this folder and
at most 1,024 tokens of context. Other versions of Python carry slightly different text and give slightly different
figures.

Made by:

```shell
python tools/make_demo_model.py --output models/demo {options}
```

The figures alone, without training: `python tools/make_demo_model.py --evaluate-only`.

## Greedy continuations

{quotes}
"""
