"""The hours in which a server serves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from petals_core.errors import ConfigurationError

_DAY_MIN: Final = 24 * 60
_SPAN: Final = re.compile(r"([0-2]?[0-9]):([0-5][0-9])-([0-2]?[0-9]):([0-5][0-9])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Times of the day, in minutes from midnight of local time; spans may go over midnight."""

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``22:00-07:00``, or several such separated by commas.

        Raises:
            ConfigurationError: ``text`` has another form.
        """
        spans = []
        for part in text.split(","):
            match = _SPAN.fullmatch(part.strip())
            numbers = [0] * 4 if match is None else [int(number) for number in match.groups()]
            start, end = 60 * numbers[0] + numbers[1], 60 * numbers[2] + numbers[3]
            if start == end or max(start, end) > _DAY_MIN:
                raise ConfigurationError(
                    f"--schedule {text!r} is no time of the day: give for example 22:00-07:00 or 0:00-8:00,12:00-14:00"
                )
            spans.append((start, end))
        return cls(spans=tuple(spans))

    def is_open(self, minute: int) -> bool:
        """Whether to serve at a minute of the day."""
        return any(
            start <= minute < end if start < end else minute >= start or minute < end for start, end in self.spans
        )

    def __str__(self) -> str:
        return ",".join(f"{start // 60}:{start % 60:02}-{end // 60}:{end % 60:02}" for start, end in self.spans)
