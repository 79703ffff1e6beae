"""Measured figures: medians with their spread, ratios of what was measured in turns, and what could not be measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.plan import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A sample's median and what half of it lies between."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(sample) == 1:
            return cls(median=sample[0], low=sample[0], high=sample[0], count=1)
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median=median, low=low, high=high, count=len(sample))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.low)} to {short(self.high)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One mode in one cell of the plan."""

    network: str
    scenario: str
    mode: str
    unit: Unit
    values: tuple[float, ...]
    """One a round."""
    reference: str
    ratios: tuple[float, ...]
    """How many times as fast as the reference in the same round, for each round that both finished."""
    error: str | None
    """Why there are no values, or no more of them."""

    @property
    def spread(self) -> Spread | None:
        return Spread.of(self.values) if self.values else None

    @property
    def ratio(self) -> Spread | None:
        return Spread.of(self.ratios) if self.ratios else None

    def as_json(self) -> dict[str, Any]:
        """For a file: the rounds, and what the tables say."""
        median, ratio = self.spread, self.ratio
        return {
            **{name: getattr(self, name) for name in ("network", "scenario", "mode", "reference", "error")},
            "unit": self.unit.value,
            "values": list(self.values),
            "ratios": list(self.ratios),
            "median": None if median is None else median.median,
            "quartiles": None if median is None else [median.low, median.high],
            "ratio": None if ratio is None else ratio.median,
            "ratio_quartiles": None if ratio is None else [ratio.low, ratio.high],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Figure:
        """Read what ``as_json`` wrote."""
        names = ("network", "scenario", "mode", "reference", "error")
        return cls(
            **{name: data[name] for name in names},
            unit=Unit(data["unit"]),
            values=tuple(data["values"]),
            ratios=tuple(data["ratios"]),
        )


def speed_ratios(unit: Unit, values: Sequence[float | None], reference: Sequence[float | None]) -> tuple[float, ...]:
    """How many times as fast, round by round; rounds that one of the two has not finished are left out."""
    pairs = [(ours, theirs) for ours, theirs in zip(values, reference, strict=True) if ours and theirs]
    return tuple(ours / theirs if unit is Unit.RATE else theirs / ours for ours, theirs in pairs)


def short(number: float) -> str:
    """Three digits, without an exponent."""
    if number == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(number):e}".partition("e")[2]))
    return f"{number:,.{digits}f}"
