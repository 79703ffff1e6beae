"""The demo model's text: beginnings that neither it nor its draft model has learned from."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AutoTokenizer

from demo_model import corpus, tokenizer
from make_demo_model import HELDOUT_SHARE, ROOT

DEMO, DRAFT = ROOT / "models" / "demo", ROOT / "models" / "demo-draft"


def beginnings(count: int, num_tokens: int) -> list[list[int]]:
    """The first tokens of so many texts, from all over the corpus."""
    words: Any = AutoTokenizer.from_pretrained(DEMO)
    found = corpus.collect(seed=0, heldout_share=HELDOUT_SHARE)
    rows = [row for row in tokenizer.encode(words, found.heldout) if len(row) > num_tokens]
    return [np.asarray(row[:num_tokens]).tolist() for row in rows[:: max(1, len(rows) // count)][:count]]
