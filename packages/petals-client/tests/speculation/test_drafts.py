"""The rule that takes sampled drafts keeps the distribution, and takes as many as can be taken."""

from __future__ import annotations

import pytest
import torch

from petals_client.speculation.drafts import accept_or_resample

NUM_ROWS = 20_000


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square: the chance of counts that lie further from ``expected``, which has none below about 5."""
    statistic = ((counts - expected).square() / expected).sum().double()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_chosen_tokens_are_distributed_as_wanted(sharpness: float) -> None:
    torch.manual_seed(3)
    wanted = torch.randn(10).softmax(0)
    drafted = (sharpness * torch.randn(10)).softmax(0)
    drafted[2], wanted[7] = 0, 0
    drafted, wanted = drafted / drafted.sum(), wanted / wanted.sum()
    tokens = torch.multinomial(drafted, NUM_ROWS, replacement=True)
    chosen = accept_or_resample(wanted.expand(NUM_ROWS, -1), drafted.expand(NUM_ROWS, -1), tokens)
    counts = torch.bincount(chosen, minlength=10).float()
    assert counts[7] == 0
    kept = wanted > 0
    assert p_value(counts[kept], NUM_ROWS * wanted[kept]) > 0.01
    assert p_value(torch.bincount(tokens, minlength=10).float()[kept] + 1e-9, NUM_ROWS * wanted[kept]) < 1e-6
    share = float((chosen == tokens).float().mean())
    assert share == pytest.approx(float(torch.minimum(wanted, drafted).sum()), abs=0.015)


def test_equal_distributions_take_all() -> None:
    probabilities = torch.tensor([0.1, 0.6, 0.3]).expand(100, -1)
    tokens = torch.multinomial(probabilities, 1).squeeze(1)
    assert torch.equal(accept_or_resample(probabilities, probabilities.clone(), tokens), tokens)


def test_what_can_not_be_is_never_taken() -> None:
    wanted = torch.tensor([[0.0, 1.0]]).expand(50, -1)
    drafted = torch.tensor([[1.0, 0.0]]).expand(50, -1)
    assert accept_or_resample(wanted, drafted, torch.zeros(50, dtype=torch.long)).eq(1).all()
