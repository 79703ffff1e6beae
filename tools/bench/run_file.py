"""A run's figures as a file: written as they come, so that a run that is cut off can be drawn, or gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.figures import Figure
from bench.plan import MODES, NETWORKS, SCENARIOS, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a file of figures holds."""

    plan: Plan
    facts: tuple[str, ...]
    figures: tuple[Figure, ...]

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "facts": list(self.facts),
            "scenarios": [each.name for each in self.plan.scenarios],
            "networks": [each.name for each in self.plan.networks],
            "modes": [each.name for each in self.plan.modes],
            "figures": [figure.as_json() for figure in self.figures],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what ``as_json`` wrote."""
        plan = Plan(
            scenarios=[each for each in SCENARIOS if each.name in data["scenarios"]],
            networks=[each for each in NETWORKS if each.name in data["networks"]],
            modes=[each for each in MODES if each.name in data["modes"]],
            minutes=0.0,
            most_minutes=0.0,
            min_rounds=0,
            max_rounds=0,
        )
        return cls(plan=plan, facts=tuple(data["facts"]), figures=tuple(map(Figure.from_json, data["figures"])))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            OSError: there is none.
            ValueError: it holds something else.
        """
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no figures of this suite") from error

    def write(self, path: Path) -> None:
        """Put the run into a file; at no time there is half of one."""
        written = path.with_suffix(".part")
        written.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        written.replace(path)


def complete(figures: Sequence[Figure]) -> tuple[Figure, ...]:
    """Figures of those cells of which something was measured; the others can be tried again."""
    measured = {(each.network, each.scenario) for each in figures if each.values}
    return tuple(each for each in figures if (each.network, each.scenario) in measured)
