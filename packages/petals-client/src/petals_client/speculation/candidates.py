"""Transformers' own assistants for several rows at once, where its assisted generation takes only one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from petals_client.speculation.drafts import Drafts

if TYPE_CHECKING:
    from petals_core.models.transformers_private import DecodingCall


class CandidateDrafter:
    """A drafter of ``assistant_model=`` or ``prompt_lookup_num_tokens=`` for each row, as Transformers makes them.

    As many columns are checked as the row with the shortest draft has; rows keep what they have left.
    """

    def __init__(self, call: DecodingCall) -> None:
        self._call = call
        self._drafters: dict[int, Callable[[Tensor], Tensor]] = {}
        self._left: list[Tensor] = [call.tokens.new_empty(0) for _ in call.tokens]

    def draft(self, tokens: Tensor, open_rows: Sequence[int], max_drafts: int) -> Drafts:
        """See ``Drafter.draft``."""
        width = max_drafts
        for row in open_rows:
            if width and not len(self._left[row]):
                if row not in self._drafters:
                    self._drafters[row] = self._call.new_drafter(row, tokens)
                self._left[row] = self._drafters[row](tokens[row]).to(tokens)
            width = min(width, len(self._left[row]))
        drafts = tokens.new_zeros(len(tokens), width)
        for row in open_rows:
            drafts[row] = self._left[row][:width]
        return Drafts(tokens=drafts)

    def note(self, drafts: Drafts, open_rows: Sequence[int], tokens: Tensor, num_new: int, trip_s: float) -> None:
        """See ``Drafter.note``."""
        for row, left in enumerate(self._left):
            held = torch.equal(left[:num_new], tokens[row, -num_new:])
            self._left[row] = left[num_new:] if held else left[:0]
