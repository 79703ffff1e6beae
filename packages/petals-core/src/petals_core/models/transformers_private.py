"""The one file that touches private parts of Transformers: names that begin with an underscore.

Most of it is how ``generate`` is entered when a model's blocks are elsewhere: its cache, and a decoding loop that
drafts. When an upgrade of Transformers breaks something, look here first.

Read against 5.17 and 5.23 (``generation/utils.py``, ``generation/candidate_generator.py``).

Letters: R rows of a batch, L columns so far, P of them prompts, W drafted columns, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from petals_core.errors import InvalidRequestError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from petals_core.models.transformers_forward import CountingCache


# --- classes and configs ----------------------------------------------------------------------------------------------


def is_stateful(base_class: type[PreTrainedModel]) -> bool:
    """Whether the class says that it keeps a state beside keys and values (``_is_stateful``)."""
    return bool(getattr(base_class, "_is_stateful", False))


def takes_attention_functions(base_class: type[PreTrainedModel]) -> bool:
    """Whether blocks attend by a function that can be registered (``_supports_attention_backend``)."""
    return bool(getattr(base_class, "_supports_attention_backend", False))


def attention_name(config: PreTrainedConfig) -> str:
    """What a loaded model attends by (``_attn_implementation``); ``eager`` alone keeps scores."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def set_attention_name(config: PreTrainedConfig, name: str) -> None:
    """Let the model of this config attend by another function from its next call on."""
    config._attn_implementation = name


def forget_attention(name: str) -> None:
    """Take back what was registered as an attention and as its mask (``_global_mapping``)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


# --- generate ---------------------------------------------------------------------------------------------------------


class GenerationEntry:
    """Mixin before a model class: ``generate`` gets its cache from ``_new_generation_cache`` and from nowhere else.

    ``GenerationMixin.generate`` calls ``_prepare_cache_for_generation`` once, after it has worked out all lengths, and
    takes what that leaves in ``model_kwargs["past_key_values"]``. The default makes a ``DynamicCache``.
    """

    def _new_generation_cache(self, max_length: int) -> CountingCache:
        """Return an empty cache for up to ``max_length`` columns."""
        raise NotImplementedError

    def _check_generation_cache(self, cache: CountingCache, max_length: int, num_drafts: int) -> None:
        """Raise if a cache that was passed in can't grow to ``max_length`` columns, or for a moment to more."""
        raise NotImplementedError

    def _decode_with_drafts(self, call: DecodingCall) -> Any:
        """Run assisted generation for several rows, and return ``call.result(...)``."""
        raise NotImplementedError

    def _wants_drafts(self) -> bool:
        """Whether greedy decoding and sampling go through ``_decode_with_drafts`` too."""
        raise NotImplementedError

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by ``generate`` for greedy decoding and sampling."""
        has_loop = (
            not synced_gpus
            and not getattr(generation_config, "is_assistant", False)
            and bool(model_kwargs.get("use_cache"))
            and self._wants_drafts()
        )
        if not has_loop:
            return super()._sample(  # type: ignore[misc]
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        return self._decode_with_drafts(
            DecodingCall(
                model=self,
                tokens=input_ids,
                processors=logits_processor,
                criteria=stopping_criteria,
                config=generation_config,
                streamer=streamer,
                assistants=None,
                model_kwargs=model_kwargs,
            )
        )

    def _assisted_decoding(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        inputs_tensor: torch.Tensor | None = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by ``generate`` when there is something to draft with; the original refuses more than one row."""
        for name in ("assistant_early_exit", "use_mtp"):
            if getattr(generation_config, name, None):
                raise InvalidRequestError(
                    f"{name} drafts with the model's own blocks, which are remote: "
                    "draft with prompt_lookup_num_tokens, or a small assistant_model"
                )
        assistants = {
            "assistant_model": assistant_model,
            "assistant_tokenizer": assistant_tokenizer,
            "tokenizer": tokenizer,
        }
        if input_ids.shape[0] == 1:
            return super()._assisted_decoding(  # type: ignore[misc]
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                inputs_tensor=inputs_tensor,
                **assistants,
                **model_kwargs,
            )
        if not model_kwargs.get("use_cache"):
            raise InvalidRequestError("drafts are checked in a session: leave use_cache=False out")
        return self._decode_with_drafts(
            DecodingCall(
                model=self,
                tokens=input_ids,
                processors=logits_processor,
                criteria=stopping_criteria,
                config=generation_config,
                streamer=streamer,
                assistants=assistants,
                model_kwargs=model_kwargs,
            )
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        from petals_core.models.transformers_forward import CountingCache

        cache = model_kwargs.get("past_key_values")
        # Prompt lookup drafts beyond the last token that may be kept; drafts of an assistant are cut before.
        num_drafts = generation_config.prompt_lookup_num_tokens or 0
        if cache is not None:
            assert isinstance(cache, CountingCache)
            cache.is_to_be_skipped = generation_mode == "assisted_generation" and cache.get_seq_length() > 0
            self._check_generation_cache(cache, max_cache_length, num_drafts)
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self._new_generation_cache(max_cache_length + 1 + num_drafts)


@dataclass(slots=True, kw_only=True, eq=False)
class DecodingCall:
    """A call of ``_sample`` or ``_assisted_decoding``: what a decoding loop is given, and its way to the model."""

    model: Any
    tokens: torch.Tensor
    """Prompts: int64 [R, P]; [R, 0] if they are embeddings."""
    processors: Any
    criteria: Any
    config: GenerationConfig
    streamer: Any
    assistants: dict[str, Any] | None
    """What Transformers is to draft with; None: it is not asked to."""
    model_kwargs: dict[str, Any]
    is_first: bool = True
    """Whether the prompts are yet to be computed, for which drafts are of no use."""
    _last: Any = None
    _hidden_states: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    @property
    def pad_token(self) -> torch.Tensor | None:
        """What rows that have ended are filled up with, as ``generate`` has worked it out (``_pad_token_tensor``)."""
        return getattr(self.config, "_pad_token_tensor", None)

    def new_drafter(self, row: int, tokens: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Make what drafts for one row of tokens [R, L]: takes its tokens, pads included, gives what may come next.

        ``_get_candidate_generator`` makes what the original would use. It drafts without logits processors (one that
        treats rows differently would take each row for the first) and without sampling (random numbers are left to the
        choice of tokens), and never sees pads.
        """
        assert self.assistants is not None
        mask = self.model_kwargs.get("attention_mask")
        is_token = torch.ones_like(tokens[row]) if mask is None else mask[row, : tokens.shape[1]]
        columns = is_token.nonzero().flatten()
        num_pads = int(columns[0]) if len(columns) else tokens.shape[1]
        first = tokens[row : row + 1, num_pads:]
        config = copy.deepcopy(self.config)
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = None
        generator = self.model._get_candidate_generator(
            generation_config=config,
            input_ids=first,
            inputs_tensor=first,
            logits_processor=None,
            model_kwargs={"attention_mask": torch.ones_like(first)},
            assistant_model=self.assistants["assistant_model"],
            assistant_tokenizer=self.assistants["assistant_tokenizer"],
            target_tokenizer=self.assistants["tokenizer"],
        )

        def draft(tokens: torch.Tensor) -> torch.Tensor:
            known = tokens[None, num_pads:]
            if known.shape[1] == 0:
                return tokens.new_empty(0)
            candidates: torch.Tensor = generator.get_candidates(known)[0]
            return candidates[0, known.shape[1] :]

        return draft

    def forward(self, tokens: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        """Run tokens [R, L] and drafts [R, W] that are not cached yet; returns logits [R, W + 1, V].

        As the originals do it: the prompts through ``_prefill``, the rest through ``prepare_inputs_for_generation``.
        """
        width = drafts.shape[1]
        if self.is_first:
            assert width == 0, "there are no drafts before the prompts are computed"
            outputs = self.model._prefill(tokens, self.config, self.model_kwargs)
            self.is_first = False
        else:
            inputs = self.model.prepare_inputs_for_generation(
                torch.cat([tokens, drafts], dim=1) if width else tokens,
                next_sequence_length=width + 1,
                is_first_iteration=False,
                **(_lengthen(self.model_kwargs, width) if width else self.model_kwargs),
            )
            if "logits_to_keep" in inputs:
                inputs["logits_to_keep"] = width + 1
            outputs = self.model(**inputs, return_dict=True)
        self._last = outputs
        logits: torch.Tensor = outputs.logits[:, -width - 1 :]
        return logits

    def keep(self, num_new: int, num_drafts: int) -> None:
        """Take back all drafts but those that became ``num_new`` tokens, the last of which is not cached yet."""
        if num_new <= num_drafts:
            self.model_kwargs["past_key_values"].crop(num_new - 1 - num_drafts)
        self.model_kwargs = _lengthen(self.model_kwargs, num_new)
        states = self._last.hidden_states
        if states is not None:
            begin = states[0].shape[1] - num_drafts
            bounds = [0, *range(begin, begin + num_new)]
            for first, last in pairwise(bounds):
                self._hidden_states.append(tuple(state[:, first:last] for state in states))

    def result(self, tokens: torch.Tensor, *, scores: Sequence[torch.Tensor], logits: Sequence[torch.Tensor]) -> Any:
        """What ``generate`` returns."""
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        config = self.config
        if self.streamer is not None:
            self.streamer.end()
        if not config.return_dict_in_generate:
            return tokens
        make: Any = GenerateDecoderOnlyOutput  # its annotations are narrower than what Transformers itself puts in
        return make(
            sequences=tokens,
            scores=tuple(scores) if config.output_scores else None,
            logits=tuple(logits) if config.output_logits else None,
            hidden_states=tuple(self._hidden_states) if config.output_hidden_states else None,
            past_key_values=self.model_kwargs["past_key_values"],
        )


def _lengthen(model_kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """The same arguments for ``count`` more columns that hold tokens in all rows."""
    lengthened = dict(model_kwargs)
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        lengthened["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], count)], dim=1)
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        more = positions[:, -1:] + 1
        if count != 1:
            more = more + torch.arange(count, device=positions.device)
        lengthened["position_ids"] = torch.cat([positions, more], dim=1)
    return lengthened


def skip_cached(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap a class's ``prepare_inputs_for_generation`` so that assisted generation may go on from a filled cache.

    Its first step passes the whole sequence whatever is cached, where all other modes slice it in ``_prefill``. (A
    local model then computes the beginning twice, at wrong positions.) The signature stays: ``generate`` reads it.
    """
    from petals_core.models.transformers_forward import CountingCache

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(
        self: Any, input_ids: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        if isinstance(past_key_values, CountingCache) and past_key_values.is_to_be_skipped and not args:
            past_key_values.is_to_be_skipped = False
            if kwargs.get("next_sequence_length") is None:
                kwargs["next_sequence_length"] = input_ids.shape[1] - past_key_values.get_seq_length()
        return prepare(self, input_ids, *args, past_key_values=past_key_values, **kwargs)

    return prepare_inputs_for_generation
