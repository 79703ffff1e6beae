"""Drafts for several rows at once, where Transformers' own assisted generation takes only one.

Rows stay side by side: a round checks as many drafted tokens as the row with the shortest draft has, and accepts them
column by column until some row chooses another token than was drafted for it. Logits processors, sampling and stopping
criteria see what they see without drafts, one column of all rows after another, so the tokens are those of plain
generation: greedy ones, and sampled ones from the same seed.

Letters: R rows, L columns so far, W drafted columns, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from petals_core.models.transformers_generation import AssistedCall


def decode_with_drafts(call: AssistedCall) -> Any:
    """Generate for all rows of a call of ``generate``, and return what that returns."""
    rows = _Rows(call)
    while not rows.are_finished:
        drafts = rows.draft()
        logits = call.forward(rows.tokens, drafts)
        num_new = rows.accept(drafts, logits)
        call.keep(num_new, drafts.shape[1])
    return call.result(rows.tokens, scores=rows.scores, logits=rows.logits)


class _Rows:
    """All rows of one call, and what is drafted for each."""

    def __init__(self, call: AssistedCall) -> None:
        self.tokens = call.tokens
        """Prompts and what came behind them: int64 [R, L]."""
        self.scores: list[Tensor] = []
        """[R, V] for each new column, if they are asked for."""
        self.logits: list[Tensor] = []
        self.are_finished = False
        self._call = call
        self._drafters = [call.new_drafter(row) for row in range(len(self.tokens))]
        self._drafts = [self.tokens.new_empty(0) for _ in self._drafters]
        """What each row has left of its last draft."""
        self._unfinished = torch.ones(len(self.tokens), dtype=torch.long, device=self.tokens.device)
        # As without drafts: rows that have ended are filled up with pads only if tokens can end them.
        has_end = any(hasattr(criterion, "eos_token_id") for criterion in call.criteria)
        self._pad: Tensor | None = getattr(call.config, "_pad_token_tensor", None) if has_end else None

    def draft(self) -> Tensor:
        """Return [R, W] tokens that may come next; W is 0 if there is nothing to draft for some row."""
        num_rows, length = self.tokens.shape
        room = self._call.config.max_length - length - 1 if self._call.may_draft else 0
        open_rows = [row for row in range(num_rows) if self._pad is None or self._unfinished[row]]
        width = max(0, room)
        for row in open_rows:
            if width and not len(self._drafts[row]):
                self._drafts[row] = self._drafters[row](self.tokens[row]).to(self.tokens)
            width = min(width, len(self._drafts[row]))
        drafts = self.tokens.new_full((num_rows, width), 0 if self._pad is None else int(self._pad))
        for row in open_rows:
            drafts[row] = self._drafts[row][:width]
        return drafts

    def accept(self, drafts: Tensor, logits: Tensor) -> int:
        """Choose tokens by logits [R, W + 1, V] for as long as drafts come true; returns the number of new columns."""
        num_new = 0
        for index in range(logits.shape[1]):
            column = self._choose(logits[:, index])
            num_new += 1
            if self.are_finished or (index < drafts.shape[1] and not torch.equal(column, drafts[:, index])):
                break
        for row, draft in enumerate(self._drafts):
            came_true = torch.equal(draft[:num_new], self.tokens[row, -num_new:])
            self._drafts[row] = draft[num_new:] if came_true else draft[:0]
        return num_new

    def _choose(self, logits: Tensor) -> Tensor:
        """Append a column of one token for each row, and return it [R]."""
        config = self._call.config
        logits = logits.to(copy=True, dtype=torch.float32, device=self.tokens.device)
        scores = self._call.processors(self.tokens, logits)
        keeps_scores = config.return_dict_in_generate and config.output_scores
        if keeps_scores:
            self.scores.append(scores)
        if config.return_dict_in_generate and config.output_logits:
            self.logits.append(logits)
        if config.do_sample:
            column = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            column = scores.argmax(dim=-1)
        if self._pad is not None:
            column = torch.where(self._unfinished.bool(), column, self._pad.to(column))
        self.tokens = torch.cat([self.tokens, column[:, None]], dim=1)
        if self._call.streamer is not None:
            self._call.streamer.put(column.cpu())
        self._unfinished &= ~self._call.criteria(self.tokens, tuple(self.scores) if keeps_scores else None)
        self.are_finished = not bool(self._unfinished.any())
        return column
