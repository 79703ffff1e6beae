"""Drafts of a small model on this machine.

Letters: R rows, L columns so far, C of them cached, W drafted columns, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation import logits_process

from petals_client.speculation.drafts import Drafts
from petals_core.errors import CheckpointError, ConfigurationError, InvalidRequestError
from petals_core.models.sources import open_source
from petals_core.models.transformers_loading import quiet_and_sequential
from petals_core.models.transformers_structure import takes_position_ids

_REPEATABLE = tuple(
    getattr(logits_process, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
    if hasattr(logits_process, name)
)
"""Processors that remember nothing, so that drafts may go through them too."""


def draft_processors(processors: Any) -> Any:
    """Those of a call's logits processors that may see tokens which are taken back later."""
    return logits_process.LogitsProcessorList(each for each in processors if type(each) in _REPEATABLE)


@functools.lru_cache(maxsize=4)
def load_draft_model(name_or_path: str) -> Any:
    """Load a model for drafting, once.

    Raises:
        ConfigurationError: it can't be loaded.
    """
    try:
        open_source(name_or_path)
        with quiet_and_sequential():
            return AutoModelForCausalLM.from_pretrained(name_or_path).eval()
    except (CheckpointError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(f"the draft model {name_or_path} can't be loaded: {reason}") from None


class DraftModel:
    """A model that drafts for all rows of one call of ``generate``, with a cache of its own."""

    def __init__(self, model: Any, *, vocabulary: int, mask: Tensor | None, processors: Any, do_sample: bool) -> None:
        """``mask`` [R, columns of the prompts] is 0 at pads; None: there are none.

        Raises:
            InvalidRequestError: the model has other tokens than the one that is drafted for.
        """
        known = model.config.get_text_config().vocab_size
        if known != vocabulary:
            raise InvalidRequestError(
                f"the draft model knows {known} tokens and the model {vocabulary}: draft with a model that has the "
                "same tokenizer, or pass it as assistant_model with assistant_tokenizer"
            )
        self._model = model
        self._mask = None if mask is None or bool(mask.all()) else mask.to(model.device)
        self._processors = processors
        self._do_sample = do_sample
        self._takes_positions = takes_position_ids(type(model).forward)
        self._max_columns: int | None = getattr(model.config, "max_position_embeddings", None)
        self._cache = DynamicCache(config=model.config)
        self._cached = torch.empty(0, 0, dtype=torch.long)
        """Tokens whose columns are cached [R, C]."""

    def room(self, num_columns: int) -> int:
        """How many tokens it can draft after so many columns."""
        return 16 if self._max_columns is None else max(0, self._max_columns - num_columns)

    def num_behind(self, num_columns: int) -> int:
        """How many columns it has to read before it can draft."""
        return num_columns - self._cached.shape[1]

    @torch.no_grad()
    def draft(self, tokens: Tensor, num_drafts: int) -> Drafts:
        """Draft what may follow tokens [R, L]."""
        whole = tokens.to(self._model.device)
        self._forget(whole)
        num_known = tokens.shape[1]
        probabilities: list[Tensor] = []
        for _ in range(num_drafts):
            logits = self._forward(whole[:, self._cached.shape[1] :], whole)
            scores = self._processors(whole, logits)
            if self._do_sample:
                probabilities.append(scores.softmax(dim=-1))
                column = torch.multinomial(probabilities[-1], num_samples=1)
            else:
                column = scores.argmax(dim=-1, keepdim=True)
            whole = torch.cat([whole, column], dim=1)
        return Drafts(
            tokens=whole[:, num_known:].to(tokens.device),
            probabilities=torch.stack(probabilities, dim=1).to(tokens.device) if probabilities else None,
        )

    def _forward(self, new: Tensor, whole: Tensor) -> Tensor:
        """Read new columns [R, L - C] and return the last one's logits, float32 [R, V]."""
        options: dict[str, Any] = {}
        if self._mask is not None:
            padding = whole.shape[1] - self._mask.shape[1]
            mask = torch.nn.functional.pad(self._mask, (0, padding), value=1)
            options["attention_mask"] = mask
            if self._takes_positions:
                positions = (mask.long().cumsum(dim=1) - 1).clamp_(min=0)
                options["position_ids"] = positions[:, -new.shape[1] :]
        is_first = self._cached.shape[1] == 0
        output = self._model(new, past_key_values=self._cache, use_cache=True, **options)
        if is_first and hasattr(self._cache, "activate_past_recording"):
            self._cache.activate_past_recording()  # or a sliding window could not be taken back
        self._cached = whole
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _forget(self, whole: Tensor) -> None:
        """Forget cached columns from the first one on that differs from tokens [R, L]; the last one stays out."""
        num_cached = self._cached.shape[1]
        length = min(num_cached, whole.shape[1] - 1)
        if length:
            differs = (self._cached[:, :length] != whole[:, :length]).any(dim=0).nonzero()
            if len(differs):
                length = int(differs[0])
        if length < num_cached:
            self._cache.crop(length - num_cached)
            self._cached = self._cached[:, :length]
