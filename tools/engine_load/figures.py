"""What was measured, beside what is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of a report."""

    name: str
    measured: str
    target: str = ""
    is_met: bool | None = None
    """None: nothing is asked for."""


def at_least(name: str, value: float, target: float, unit: str = "") -> Figure:
    """A figure that has to reach a target."""
    return Figure(
        name=name, measured=f"{_number(value)}{unit}", target=f"at least {target:g}{unit}", is_met=value >= target
    )


def at_most(name: str, value: float, target: float, unit: str = "") -> Figure:
    """A figure that may not go beyond a target."""
    return Figure(
        name=name, measured=f"{_number(value)}{unit}", target=f"at most {target:g}{unit}", is_met=value <= target
    )


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 0.01 else f"{value:.0f}" if value == int(value) else f"{value:.2f}"


def note(name: str, measured: str) -> Figure:
    """A figure that is only told."""
    return Figure(name=name, measured=measured)


def report(console: Console, title: str, figures: list[Figure]) -> bool:
    """Print figures; True if all targets are met."""
    table = Table("figure", "measured", "target", "", title=title)
    for figure in figures:
        verdict = "" if figure.is_met is None else "[green]met[/]" if figure.is_met else "[red]missed[/]"
        table.add_row(figure.name, figure.measured, figure.target, verdict)
    console.print(table)
    return all(figure.is_met is not False for figure in figures)


def histogram(values_ms: list[float], *, width: int = 40, num_bins: int = 12) -> list[str]:
    """Lines of a histogram over a logarithmic scale."""
    low, high = min(values_ms), max(values_ms)
    factor = max(1.01, (high / low) ** (1 / num_bins))
    edges = [low * factor**number for number in range(num_bins + 1)]
    counts = [sum(edges[n] <= value < edges[n + 1] for value in values_ms) for n in range(num_bins)]
    counts[-1] += sum(value >= edges[-1] for value in values_ms)
    most = max(counts)
    return [
        f"{edges[n]:9.1f} to {edges[n + 1]:9.1f} ms {counts[n]:5d} {'#' * round(width * counts[n] / most)}"
        for n in range(num_bins)
    ]
