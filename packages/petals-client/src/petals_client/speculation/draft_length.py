"""How many tokens to draft: as many as make the most tokens per second by what trips and drafts were so far.

A trip that checks W drafts brings one token and those of the drafts that hold before the first that does not: with a
chance ``a`` for each, ``1 + a + a^2 + ... + a^W`` (Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding", 2023, equation 1). It costs the trip of W + 1 columns and the time of drafting. Both are measured as they
happen and forgotten slowly. Where no number of drafts is expected to pay, none are made, but for a few that take a
small share of the time and find out whether that has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

MAX_DRAFTS: Final = 16
PROBE_SHARE: Final = 0.01
"""Of the time may be spent on drafts that are not expected to pay."""
MIN_GAIN: Final = 1.05
"""Drafts have to promise so many times the tokens per second: estimates are not exact."""
_PLAIN_TRIP_EVERY: Final = (2, 4, 8, 16, 32, 64)
"""Trips after which one goes without drafts, first and later, so that the price of drafts is known and not guessed."""
_TRIP_MEMORY: Final = 12.0
_TRIP_FADING: Final = 0.99
_DRAFT_MEMORY: Final = 0.98
_MAX_SURPRISE: Final = 3.0
"""Times the expected duration that a single trip counts at most."""
_SLOPE_PRIOR: Final = 0.03
"""Share of a trip that another column costs, before it was measured."""
_SLOPE_PRIOR_WEIGHT: Final = 0.5
_RATE_PRIOR_WEIGHT: Final = 4.0


@dataclass(slots=True)
class TripCost:
    """How long trips take: those of lone tokens, for which servers have a shorter way, and those of several columns.

    Of these it is a line through the means of trips with the same number of columns. The first trip of a number of
    columns teaches nothing, because servers prepare themselves for it.
    """

    _lone: _Mean | None = None
    _several: dict[int, _Mean] = field(default_factory=dict)
    """By columns; their weights fall while others are measured."""
    _are_prepared: set[int] = field(default_factory=set)
    """Numbers of columns that there were before."""
    _line: tuple[float, float] = (0.0, 0.0)
    """Through what several columns take: seconds for none, and for each."""

    @property
    def is_known(self) -> bool:
        """Whether there was a trip of a lone token."""
        return self._lone is not None

    def is_due(self, num_columns: int) -> bool:
        """Whether a trip of so many may come next: before any has taught what several take, each waits for those
        that servers have prepared themselves for."""
        return bool(self._several) or num_columns in self._are_prepared or self._are_prepared <= {1}

    def note(self, num_columns: int, duration_s: float) -> None:
        """Take a trip into account."""
        if num_columns not in self._are_prepared:
            self._are_prepared.add(num_columns)
        elif num_columns == 1:
            self._lone = _note(self._lone, duration_s)
        else:
            if self._lone is not None:  # not even a server that does nothing but compute takes as long as for as many
                duration_s = min(duration_s, num_columns * self._lone.duration_s)
            for columns, mean in self._several.items():
                self._several[columns] = mean._replace(weight=mean.weight * _TRIP_FADING)
            self._several[num_columns] = _note(self._several.get(num_columns), duration_s)
            self._line = _line_through(self._several)

    def duration_s(self, num_columns: int) -> float:
        """Expected duration of a trip; more columns are never cheaper. A lone token's must be known."""
        assert self._lone is not None
        lone_s = self._lone.duration_s
        if not self._several:
            return lone_s * (1 + _SLOPE_PRIOR * (num_columns - 1))
        return lone_s if num_columns == 1 else max(lone_s, self._line[0] + self._line[1] * num_columns)


class _Mean(NamedTuple):
    """Of recent trips of one kind."""

    duration_s: float
    weight: float
    """Trips that it stands for."""


def _note(mean: _Mean | None, duration_s: float) -> _Mean:
    """A mean with one more trip."""
    if mean is None:
        return _Mean(duration_s, 1.0)
    weight = min(mean.weight + 1, _TRIP_MEMORY)
    surprise_s = min(duration_s, _MAX_SURPRISE * mean.duration_s) - mean.duration_s
    return _Mean(mean.duration_s + surprise_s / weight, weight)


def _line_through(means: Mapping[int, _Mean]) -> tuple[float, float]:
    """A line through means by columns: seconds for none, and for each."""
    total = sum(mean.weight for mean in means.values())
    mean_x = sum(mean.weight * columns for columns, mean in means.items()) / total
    mean_y = sum(mean.weight * mean.duration_s for mean in means.values()) / total
    variance = sum(mean.weight * (columns - mean_x) ** 2 for columns, mean in means.items())
    covariance = sum(mean.weight * (columns - mean_x) * (mean.duration_s - mean_y) for columns, mean in means.items())
    guess = _SLOPE_PRIOR * mean_y
    slope = max(0.0, (covariance + guess * _SLOPE_PRIOR_WEIGHT) / (variance + _SLOPE_PRIOR_WEIGHT))
    slope = min(slope, mean_y / mean_x)
    return mean_y - slope * mean_x, slope


@dataclass(slots=True)
class Acceptance:
    """The chance that a drafted token holds if all before it did."""

    prior: float
    _num_tried: float = 0.0
    _num_held: float = 0.0

    def note(self, num_held: int, num_failed: int) -> None:
        """Take drafts into account that were looked at."""
        for held, count in ((1.0, num_held), (0.0, num_failed)):
            for _ in range(count):
                self._num_tried = self._num_tried * _DRAFT_MEMORY + 1
                self._num_held = self._num_held * _DRAFT_MEMORY + held

    @property
    def rate(self) -> float:
        """In (0, 1)."""
        return (self._num_held + self.prior * _RATE_PRIOR_WEIGHT) / (self._num_tried + _RATE_PRIOR_WEIGHT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Drafts that could be checked: from which source those of each row are, and how many there are at most."""

    sources: tuple[str, ...]
    max_drafts: int
    is_free: bool
    """Whether they are there already, and not made once they are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which offer to take, None for none of them, and how many of its drafts."""

    index: int | None
    num_drafts: int
    is_probe: bool = False
    """Whether they do not promise to pay, but are to show whether that has changed."""


NO_DRAFTS: Final = Choice(index=None, num_drafts=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutcome:
    """What became of one row's drafts: those that held, and whether the next one was looked at and did not."""

    source: str
    num_held: int
    has_failed: bool


@dataclass(slots=True)
class DraftLength:
    """What was learned from all trips of a model, and what follows from it for the next one."""

    priors: dict[str, float] = field(default_factory=dict)
    """Chances of sources that were not tried yet; 0.6 for others."""
    _trips: dict[int, TripCost] = field(default_factory=dict)
    """By the number of rows."""
    _drafting_s: dict[tuple[str, int], float] = field(default_factory=dict)
    """Of one column, by source and number of rows."""
    _acceptance: dict[str, Acceptance] = field(default_factory=dict)
    _credit_s: float = 0.0
    """What may be spent on drafts that do not promise to pay."""
    _probe_s: float = 0.0
    """What those would have taken that were too dear last."""
    _num_since_plain: int = 0
    _num_plain: int = 0
    """Trips without drafts that were due, up to the last of ``_PLAIN_TRIP_EVERY``."""

    def choose(self, num_rows: int, offers: Sequence[Offer]) -> Choice:
        """Return what to draft for the next trip of a batch."""
        trip = self._trips.get(num_rows)
        if trip is None or not trip.is_known or self._num_since_plain >= _PLAIN_TRIP_EVERY[self._num_plain]:
            return NO_DRAFTS
        plain_s = trip.duration_s(1)
        best, best_rate = NO_DRAFTS, MIN_GAIN / plain_s
        for index, offer in enumerate(offers):
            drafting_s = self._column_s(offer, num_rows)
            held = self.chance(offer)
            if best_rate * (1 - held) * (trip.duration_s(2) + drafting_s) >= 1:
                continue  # not even if as many as may hold cost as little as one
            chance, expected = 1.0, 1.0
            for num_drafts in range(1, min(offer.max_drafts, MAX_DRAFTS) + 1):
                chance *= held
                expected += chance
                rate = expected / (trip.duration_s(1 + num_drafts) + num_drafts * drafting_s)
                if rate > best_rate and trip.is_due(1 + num_drafts):
                    best, best_rate = Choice(index=index, num_drafts=num_drafts), rate
        if best is NO_DRAFTS:
            return self._probe(num_rows, offers, trip)
        return best

    def _probe(self, num_rows: int, offers: Sequence[Offer], trip: TripCost) -> Choice:
        """Try something that doesn't promise to pay, if it was saved for."""
        promising = [index for index, offer in enumerate(offers) if offer.max_drafts > 0]
        if not promising:
            return NO_DRAFTS
        index = max(promising, key=lambda index: self.chance(offers[index]))
        num_drafts = min(2, offers[index].max_drafts)
        price_s = trip.duration_s(1 + num_drafts) - trip.duration_s(1)
        self._probe_s = price_s + num_drafts * self._column_s(offers[index], num_rows)
        if self._probe_s > self._credit_s:
            return NO_DRAFTS
        self._credit_s -= price_s  # what making the drafts takes is known afterwards
        return Choice(index=index, num_drafts=num_drafts, is_probe=True)

    def chance(self, offer: Offer) -> float:
        """The chance that one more column of drafts holds in all rows."""
        chance = 1.0
        for source in offer.sources:
            chance *= self._of(source).rate
        return chance

    def note_drafting(
        self,
        source: str,
        num_rows: int,
        num_drafts: int,
        duration_s: float,
        *,
        is_probe: bool = False,
        is_typical: bool = True,
    ) -> None:
        """Take into account how long drafts took to make; where that is not typical it says nothing of other drafts."""
        if is_probe:
            self._credit_s -= duration_s
        if not is_typical:
            return
        each_s = duration_s / num_drafts
        known_s = self._drafting_s.get((source, num_rows))
        if known_s is not None:
            each_s = known_s + 0.1 * (min(each_s, _MAX_SURPRISE * known_s) - known_s)
        self._drafting_s[source, num_rows] = each_s

    def note_trip(self, num_rows: int, num_drafts: int, duration_s: float, outcomes: Iterable[RowOutcome]) -> None:
        """Take a trip and what became of its drafts into account."""
        self._trips.setdefault(num_rows, TripCost()).note(num_drafts + 1, duration_s)
        if num_drafts:
            self._num_since_plain += 1
        else:
            if self._num_since_plain:
                self._num_plain = min(self._num_plain + 1, len(_PLAIN_TRIP_EVERY) - 1)
            self._num_since_plain = 0
            self._credit_s = min(self._credit_s + PROBE_SHARE * duration_s, max(duration_s, self._probe_s))
        for outcome in outcomes:
            self._of(outcome.source).note(outcome.num_held, int(outcome.has_failed))

    def _column_s(self, offer: Offer, num_rows: int) -> float:
        """What making another column of drafts costs."""
        return 0.0 if offer.is_free else self._drafting_s.get((offer.sources[0], num_rows), 0.0)

    def _of(self, source: str) -> Acceptance:
        if source not in self._acceptance:
            self._acceptance[source] = Acceptance(self.priors.get(source, 0.6))
        return self._acceptance[source]
