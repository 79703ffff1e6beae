"""Whether a swarm gives what the local model gives, for one architecture; imports what the environment has.

The model is tiny and random, written as Transformers writes real ones, and split over three servers of this process
with spans of unequal length; real sockets and a real directory. Everything is computed in float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from petals_client import AutoDistributedModelForCausalLM
from petals_core.testing.factories import VOCABULARY, apply_caps, make_checkpoint
from petals_server.testing import InProcessSwarm

SPANS: Final = ((0, 1), (1, 4), (4, 6))
TOLERANCE: Final = 1e-5
"""Times the largest logit of the local model, or 1 if that is smaller."""
NUM_NEW_TOKENS: Final = 16
_WIDTH: Final = 12
_GREEDY: Final[dict[str, Any]] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of the comparisons; errors are the largest of all logits over the tolerance's base."""

    family: str
    padded_error: float
    """Of one forward of a left-padded batch of three, at the tokens."""
    session_error: float
    """Of a session in pieces, some taken back, against one forward."""
    num_equal_tokens: int
    """Of a greedy continuation of a left-padded batch of two: how many of its columns are those of the local model."""
    num_distinct_tokens: int
    """In that continuation: with few of them, equality would say little."""
    total_s: float

    @property
    def is_exact(self) -> bool:
        return max(self.padded_error, self.session_error) <= TOLERANCE and self.num_equal_tokens == NUM_NEW_TOKENS


def check(family: str, folder: Path) -> Outcome:
    """Write a checkpoint into ``folder``, serve it in a swarm of its own and compare."""
    started_s = time.perf_counter()
    make_checkpoint(folder, family)
    swarm = InProcessSwarm()
    try:
        for start, end in SPANS:
            swarm.add(folder, start, end)
        model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=swarm.initial_peers)
        try:
            local = apply_caps(AutoModelForCausalLM.from_pretrained(folder).eval())
            with torch.no_grad():
                padded_error = _compare_padded(model, local)
                session_error = _compare_session(model, local)
            actual, expected = (_continue(each) for each in (model, local))
        finally:
            model.close()
    finally:
        swarm.close()
    return Outcome(
        family=family,
        padded_error=padded_error,
        session_error=session_error,
        num_equal_tokens=int((actual == expected).all(dim=0).cumprod(dim=0).sum()),
        num_distinct_tokens=len(expected.unique()),
        total_s=time.perf_counter() - started_s,
    )


def _tokens(seed: int, num_rows: int, width: int = _WIDTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (num_rows, width), generator=torch.Generator().manual_seed(seed))


def _left_pad(tokens: torch.Tensor, *num_pads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put pads in the place of each row's first tokens; returns tokens and mask."""
    mask = torch.stack([torch.arange(tokens.shape[1]) >= pads for pads in num_pads]).long()
    return tokens * mask, mask


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def _compare_padded(model: Any, local: Any) -> float:
    tokens, mask = _left_pad(_tokens(0, 3), 5, 0, 1)
    actual, expected = (each(tokens, attention_mask=mask).logits[mask.bool()] for each in (model, local))
    return _error(actual, expected)


def _compare_session(model: Any, local: Any) -> float:
    """A session of two rows in steps of several tokens and of one, with drafts that are taken back."""
    tokens = _tokens(1, 2)
    drafts = _tokens(2, 2, 6)
    parts = []
    with model.inference_session(max_length=32) as session:
        parts.append(model(tokens[:, :5]).logits)
        model(drafts)
        session.truncate(5)
        parts.append(model(tokens[:, 5:7]).logits)
        # The first of the drafts is right, and part of what lies before is taken back with the others.
        model(torch.cat([tokens[:, 7:8], drafts], dim=1))
        session.truncate(6)
        parts[-1] = parts[-1][:, :1]
        parts.extend(model(tokens[:, column : column + 1]).logits for column in range(6, _WIDTH))
    return _error(torch.cat(parts, dim=1), local(tokens).logits)


def _continue(model: Any) -> torch.Tensor:
    """Greedy tokens behind a left-padded prompt of two rows."""
    tokens, mask = _left_pad(_tokens(3, 2), 4, 0)
    result: torch.Tensor = model.generate(tokens, attention_mask=mask, max_new_tokens=NUM_NEW_TOKENS, **_GREEDY)
    return result[:, _WIDTH:]
