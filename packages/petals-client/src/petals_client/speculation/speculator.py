"""Drafts from all sources that a call of ``generate`` may use, as many as pay.

Letters: R rows, L columns so far, W drafted columns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from petals_client.speculation.draft_length import MAX_DRAFTS, NO_DRAFTS, Choice, DraftLength, Offer, RowOutcome
from petals_client.speculation.draft_model import DraftModel
from petals_client.speculation.drafts import Drafts, no_drafts
from petals_client.speculation.lookup import MAX_MATCH, Match, PromptLookup

MODEL_SOURCE = "model"
_MAX_BEHIND = 32
"""Columns to read up to which the time of drafting tells what drafting costs."""
PRIORS = {MODEL_SOURCE: 0.7, "lookup 2": 0.35, "lookup 3": 0.5, "lookup 4": 0.6, "lookup 5": 0.7, "lookup 8": 0.85}
"""Chances that drafts hold, before any were checked."""
_LOOKUP_SOURCES = tuple(
    f"lookup {max((least for least in (2, 3, 4, 5, 8) if least <= num_matching), default=2)}"
    for num_matching in range(MAX_MATCH + 1)
)
"""By the length of a match, the class that its drafts belong to: the longer it is, the likelier they hold."""


class Speculator:
    """A ``Drafter`` that chooses source and number of drafts before every trip."""

    def __init__(
        self,
        lengths: DraftLength,
        *,
        mask: Tensor | None,
        uses_lookup: bool,
        model: DraftModel | None,
        num_drafts: int | None,
    ) -> None:
        """``mask`` [R, columns of the prompts] is 0 at pads. With ``num_drafts`` nothing is chosen but the source."""
        self._lengths = lengths
        self._mask = mask
        self._uses_lookup = uses_lookup
        self._model = model
        self._num_drafts = num_drafts
        self._lookups: list[PromptLookup] = []
        self._num_read = 0
        self._none: Drafts | None = None
        self._sources: tuple[str, ...] = ()
        """Of the drafts that are under way, one for each open row."""

    def draft(self, tokens: Tensor, open_rows: Sequence[int], max_drafts: int) -> Drafts:
        """See ``Drafter.draft``."""
        num_rows, num_columns = tokens.shape
        max_drafts = min(max_drafts, MAX_DRAFTS)
        offers: list[Offer] = []
        matches = self._look_up(tokens, open_rows) if self._uses_lookup else None
        if matches is not None:
            sources = tuple(_LOOKUP_SOURCES[match.num_matching] for match in matches)
            offers.append(Offer(sources=sources, max_drafts=max_drafts, is_free=True))
        if self._model is not None:
            most = min(max_drafts, self._model.room(num_columns))
            offers.append(Offer(sources=(MODEL_SOURCE,) * len(open_rows), max_drafts=most, is_free=False))
        choice = self._choose(num_rows, offers)
        if choice.index is None:
            if self._none is None:
                self._none = no_drafts(tokens)
            return self._none
        offer = offers[choice.index]
        self._sources = offer.sources
        if not offer.is_free:
            return self._draft_with_model(tokens, choice)
        assert matches is not None
        drafted = torch.zeros(num_rows, choice.num_drafts, dtype=torch.long)
        for row, match in zip(open_rows, matches, strict=True):
            drafted[row] = torch.tensor(self._lookups[row].follow(match, choice.num_drafts))
        return Drafts(tokens=drafted.to(tokens.device))

    def note(self, drafts: Drafts, open_rows: Sequence[int], tokens: Tensor, num_new: int, trip_s: float) -> None:
        """See ``Drafter.note``."""
        num_drafts = drafts.tokens.shape[1]
        outcomes: list[RowOutcome] = []
        num_seen = min(num_new, num_drafts)
        if num_seen:
            stands = tokens[:, tokens.shape[1] - num_new :][:, :num_seen]
            held = (stands == drafts.tokens[:, :num_seen]).long().cumprod(dim=1).sum(dim=1).tolist()
            outcomes = [
                RowOutcome(source=source, num_held=held[row], has_failed=held[row] < num_seen)
                for row, source in zip(open_rows, self._sources, strict=True)
            ]
        self._lengths.note_trip(tokens.shape[0], num_drafts, trip_s, outcomes)

    def _choose(self, num_rows: int, offers: Sequence[Offer]) -> Choice:
        if self._num_drafts is None:
            return self._lengths.choose(num_rows, offers)
        possible = [index for index, offer in enumerate(offers) if offer.max_drafts > 0]
        if not possible or self._num_drafts < 1:
            return NO_DRAFTS
        index = max(possible, key=lambda index: self._lengths.chance(offers[index]))
        return Choice(index=index, num_drafts=min(self._num_drafts, offers[index].max_drafts))

    def _draft_with_model(self, tokens: Tensor, choice: Choice) -> Drafts:
        assert self._model is not None
        num_behind = self._model.num_behind(tokens.shape[1])
        started_s = time.perf_counter()
        drafts = self._model.draft(tokens, choice.num_drafts)
        self._lengths.note_drafting(
            MODEL_SOURCE,
            tokens.shape[0],
            choice.num_drafts,
            time.perf_counter() - started_s,
            is_probe=choice.is_probe,
            is_typical=num_behind <= _MAX_BEHIND,
        )
        return drafts

    def _look_up(self, tokens: Tensor, open_rows: Sequence[int]) -> list[Match] | None:
        """Where the rows that are open find themselves; None unless all do."""
        if not self._lookups:
            self._lookups = [PromptLookup() for _ in range(tokens.shape[0])]
        new = tokens[:, self._num_read :].tolist()
        for row, (lookup, added) in enumerate(zip(self._lookups, new, strict=True)):
            if self._num_read == 0 and self._mask is not None:
                is_token = self._mask[row, : tokens.shape[1]].tolist()
                added = [token for index, token in enumerate(added) if index >= len(is_token) or is_token[index]]
            lookup.extend(added)
        self._num_read = tokens.shape[1]
        matches = []
        for row in open_rows:
            match = self._lookups[row].find()
            if match is None:
                return None
            matches.append(match)
        return matches
