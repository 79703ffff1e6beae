"""A decoding loop for any number of rows that checks several tokens in one trip.

Rows stay side by side: drafts are accepted column by column until some row chooses another token than was drafted for
it. Logits processors and stopping criteria see what they see without drafts, one column of all rows after another.
Drafts that were not sampled are compared with what is chosen without them, so that the tokens are those of plain
generation: greedy ones, and sampled ones from the same seed. Sampled drafts keep the distribution.

Letters: R rows, L columns so far, W drafted columns, V vocabulary.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from petals_client.speculation.drafts import Drafter, Drafts, accept_or_resample, no_drafts

if TYPE_CHECKING:
    from petals_core.models.transformers_private import DecodingCall


def decode(call: DecodingCall, drafter: Drafter) -> Any:
    """Generate for all rows of a call of ``generate``, and return what that returns."""
    rows = _Rows(call)
    while not rows.are_finished:
        room = call.config.max_length - rows.tokens.shape[1] - 1
        open_rows = rows.open_rows
        if call.is_first or room < 1:
            drafts = no_drafts(rows.tokens)
        else:
            drafts = rows.fill(drafter.draft(rows.tokens, open_rows, room))
        started_s = time.perf_counter()
        is_first = call.is_first
        logits = call.forward(rows.tokens, drafts.tokens)
        trip_s = time.perf_counter() - started_s
        num_new = rows.accept(drafts, logits)
        call.keep(num_new, drafts.tokens.shape[1])
        if not is_first:
            drafter.note(drafts, open_rows, rows.tokens, num_new, trip_s)
    return call.result(rows.tokens, scores=rows.scores, logits=rows.logits)


class _Rows:
    """All rows of one call."""

    def __init__(self, call: DecodingCall) -> None:
        self.tokens = call.tokens
        """Prompts and what came behind them: int64 [R, L]."""
        self.scores: list[Tensor] = []
        """[R, V] for each new column, if they are asked for."""
        self.logits: list[Tensor] = []
        self.are_finished = False
        self._call = call
        self._num_rows = len(self.tokens)
        self._all_rows = list(range(self._num_rows))
        self._unfinished = torch.ones(self._num_rows, dtype=torch.long, device=self.tokens.device)
        # As without drafts: rows that have ended are filled up with pads only if tokens can end them.
        has_end = any(hasattr(criterion, "eos_token_id") for criterion in call.criteria)
        pad = call.pad_token if has_end else None
        self._pad = None if pad is None else pad.to(self.tokens.device)
        self._num_unfinished = self._num_rows

    @property
    def open_rows(self) -> list[int]:
        """Rows for which tokens are still chosen."""
        if self._pad is None or self._num_unfinished == self._num_rows:
            return self._all_rows
        return self._unfinished.nonzero().flatten().tolist()

    def fill(self, drafts: Drafts) -> Drafts:
        """Let drafts of rows that have ended be the pads that will come."""
        if self._pad is None or self._num_unfinished == self._num_rows or not drafts.tokens.shape[1]:
            return drafts
        is_open = self._unfinished.bool()[:, None]
        return Drafts(tokens=torch.where(is_open, drafts.tokens, self._pad), probabilities=drafts.probabilities)

    def accept(self, drafts: Drafts, logits: Tensor) -> int:
        """Choose tokens by logits [R, W + 1, V] for as long as drafts hold; returns the number of new columns."""
        num_drafts = drafts.tokens.shape[1]
        for index in range(num_drafts + 1):
            column = self._choose(logits[:, index], drafts, index)
            if self.are_finished or index == num_drafts or not torch.equal(column, drafts.tokens[:, index]):
                return index + 1
        raise AssertionError("the last column has no draft")

    def _choose(self, logits: Tensor, drafts: Drafts, index: int) -> Tensor:
        """Append a column of one token for each row, and return it [R]."""
        config = self._call.config
        logits = logits.to(copy=True, dtype=torch.float32, device=self.tokens.device)
        scores = self._call.processors(self.tokens, logits)
        keeps_scores = config.return_dict_in_generate and config.output_scores
        if keeps_scores:
            self.scores.append(scores)
        if config.return_dict_in_generate and config.output_logits:
            self.logits.append(logits)
        if not config.do_sample:
            column = scores.argmax(dim=-1)
        elif drafts.probabilities is None or index == drafts.tokens.shape[1]:
            column = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            # Of rows that have ended the draft is a pad, which nothing was sampled from; theirs is put in below.
            wanted, drafted = scores.softmax(dim=-1), drafts.probabilities[:, index]
            column = accept_or_resample(wanted, drafted, drafts.tokens[:, index])
        if self._pad is not None and self._num_unfinished < self._num_rows:
            column = torch.where(self._unfinished.bool(), column, self._pad)
        self.tokens = torch.cat([self.tokens, column[:, None]], dim=1)
        if self._call.streamer is not None:
            self._call.streamer.put(column.cpu())
        self._unfinished &= ~self._call.criteria(self.tokens, tuple(self.scores) if keeps_scores else None)
        self._num_unfinished = int(self._unfinished.sum())
        self.are_finished = self._num_unfinished == 0
        return column
